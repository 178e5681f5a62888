"""Health for supervisors, metrics for monitoring: counts and states, never a patient and never a secret."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy.exc import SQLAlchemyError

from service.api.problems import problem_response
from service.api.schemas import Check, Health
from service.domain.access import Right
from service.domain.drift import TISSUES, Alert
from service.domain.reasons import Code
from service.settings import MIB
from service.web.desk import Desk, Needs
from service.workflow import dxa_reports, reading
from service.workflow.reading import Gauges, Outbox
from service.workflow.watching import Lookout

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operations_router(desk: Desk, lookout: Lookout) -> APIRouter:
    """Routes for machines that watch this one."""
    router = APIRouter(tags=["operations"])

    @router.get("/api/v1/health/live", response_model=Health)
    def live() -> Health:
        """The process answers."""
        return Health(status="ok")

    @router.get("/api/v1/health/ready", response_model=Health, responses={503: {"model": Health}})
    def ready() -> Response:
        """The database answers and the spool has room; 503 and the reason where not."""
        checks = {"database": _database(desk), "spool": _spool(desk)}
        told = {name: check.model_dump() for name, check in checks.items()}
        if all(check.ok for check in checks.values()):
            return JSONResponse({"status": "ok", "checks": told})
        failing = ", ".join(name for name, check in checks.items() if not check.ok)
        return problem_response(503, f"Not ready: {failing}.", checks=told)

    @router.get("/metrics", response_class=PlainTextResponse, dependencies=[Depends(Needs(Right.READ))])
    def metrics() -> PlainTextResponse:
        """Gauges in the Prometheus text format."""
        with desk.store.reading() as session:
            gauges = reading.gauges(session)
            outbox = reading.outbox(session, desk.settings.destinations)
            alerts = lookout.alerts(session)
            reports = dxa_reports.counts(session)
        now = desk.clock()
        lines = [
            *_lines(gauges, _age_s(gauges.oldest_waiting_at, now), _free_bytes(desk.settings.spool_dir)),
            *_outbox_lines(outbox, now),
            *_drift_lines(alerts),
            *_family("osteogate_dxa_reports", "Received structured reports by what became of them", reports, "state"),
        ]
        return PlainTextResponse("\n".join(lines) + "\n", media_type=METRICS_TYPE)

    return router


def _database(desk: Desk) -> Check:
    try:
        with desk.store.reading() as session:
            reading.answers(session)
            reading.gauges(session)
    except SQLAlchemyError:
        return Check(ok=False, text="The database does not answer, or is not migrated.")
    return Check(ok=True, text="The database answers.")


def _spool(desk: Desk) -> Check:
    free, floor = _free_bytes(desk.settings.spool_dir), desk.settings.disk_floor_bytes
    text = f"{free // MIB} MiB free, the floor is {floor // MIB} MiB."
    return Check(ok=free >= floor, text=text)


def _free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds (or will hold) the folder."""
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(standing).free


def _lines(gauges: Gauges, oldest_waiting_s: float, free_bytes: int) -> Iterator[str]:
    yield from _family("osteogate_studies", "Studies by state", gauges.studies, "state")
    yield from _family("osteogate_decisions", "Decisions in force", gauges.decisions, "category")
    yield from _family("osteogate_jobs", "Jobs by state", gauges.jobs, "state")
    yield from _family("osteogate_referrals", "Referrals by state", gauges.referrals, "state")
    yield from _family("osteogate_reports", "DICOM objects of the results in force by state", gauges.reports, "state")
    yield from _family("osteogate_refusals", "Refusals at the door", gauges.refusals, "kind")
    yield from _single("osteogate_instances", "Instances kept", gauges.instances)
    yield from _single("osteogate_instance_bytes", "Bytes of the instances kept", gauges.instance_bytes)
    yield from _single("osteogate_conflicts", "Instances that came with other bytes", gauges.conflicts)
    yield from _single("osteogate_oldest_waiting_job_seconds", "Age of the oldest waiting job", oldest_waiting_s)
    yield from _single("osteogate_spool_free_bytes", "Free bytes on the spool's disk", free_bytes)


def _outbox_lines(outbox: Outbox, now: datetime) -> Iterator[str]:
    lines = outbox.destinations
    waiting = {line.name: line.waiting for line in lines}
    failing = {line.name: line.failing for line in lines}
    oldest = {line.name: _age_s(line.oldest_waiting_at, now) for line in lines}
    yield from _family("osteogate_outbox_waiting", "Objects a destination does not hold yet", waiting, "destination")
    yield from _family("osteogate_outbox_failing", "Waiting objects that were tried already", failing, "destination")
    yield from _family("osteogate_outbox_oldest_waiting_seconds", "Age of the oldest of them", oldest, "destination")


def _drift_lines(alerts: Sequence[Alert]) -> Iterator[str]:
    """How many scanners stand beyond each limit; the codes are always there, so that a rule can be written."""
    codes = (*TISSUES.values(), Code.DRIFT_FLAG_RATE)
    standing = {code.value: sum(alert.reason.code is code for alert in alerts) for code in codes}
    yield from _family("osteogate_drift_alerts", "Scanners that seem to have changed", standing, "code")


def _age_s(since: datetime | None, now: datetime) -> float:
    return 0.0 if since is None else max(0.0, (now - since).total_seconds())


def _family(name: str, text: str, values: Mapping[str, float], label: str) -> Iterator[str]:
    yield f"# HELP {name} {text}."
    yield f"# TYPE {name} gauge"
    for key, value in sorted(values.items()):
        yield f'{name}{{{label}="{key}"}} {value}'


def _single(name: str, text: str, value: float) -> Iterator[str]:
    yield f"# HELP {name} {text}."
    yield f"# TYPE {name} gauge"
    yield f"{name} {value}"

"""A model in shadow: its values are kept beside the results, compared, and decide nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import pytest
from sqlalchemy import select

from service.domain.policy import DEFAULT_POLICY
from service.domain.result import LEVELS, Shadowed
from service.store.engine import Store
from service.store.tables import AuditRow, ShadowRow
from service.workflow import model, models, screening
from service.workflow.packages import Library
from tests.service.workflow import toy_models, workbench
from tests.service.workflow.toy_models import BY, promoted, registered

SHIPPED = model.shipped_model().sha256


@pytest.fixture
def home(tmp_path: Path) -> Library:
    return toy_models.library(tmp_path)


def screened(
    store: Store, study: str, shadow: Shadowed | None, by_model: str = SHIPPED, study_bmd: float = 0.9
) -> dict[str, object]:
    """A study's result with these values in every level; its document."""
    clock = workbench.Clock()
    held = workbench.claim(store, workbench.queued(store, clock, study), clock.now)
    assert held is not None
    made = workbench.measured()
    levels = {name: replace(level, bmd_g_cm2=study_bmd) for name, level in made.levels.items()}
    provenance = replace(made.provenance, model_sha256=by_model)
    made = replace(made, levels=levels, provenance=provenance, shadow=shadow)
    with store.transaction() as session:
        return screening.record(
            session, held, made, artefacts=None, labelled=False, policy=DEFAULT_POLICY, now=clock.now
        ).document


def says(line: models.ModelLine, bmd: float, tbs: float = 1.25) -> Shadowed:
    return Shadowed(line.sha256, dict.fromkeys(LEVELS, (bmd, tbs)))


def test_agreement_is_over_the_standing_results_of_the_model_in_force(
    store: Store, home: Library, tmp_path: Path
) -> None:
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run", n_patients_real=0)))  # no verdict needed
    with store.transaction() as session:
        assert models.begin_shadow(session, line.id, BY, library=home).shadow_since == BY.now
        beside = model.in_shadow(session, home.root)
        assert beside is not None
        assert (beside.sha256, beside.gate_passed) == (line.sha256, False)
    plain = screened(store, "1.2.0", None)
    differences = [0.01, 0.03, -0.02]
    for number, apart in enumerate(differences):
        document = screened(store, f"1.2.{number + 1}", says(line, 0.9 + apart))
        assert document["patient"] == plain["patient"]
        assert document["decision"] == plain["decision"]
        assert line.sha256 not in str(document)
    screened(store, "1.2.8", says(line, 5.0), by_model="a" * 64)  # beside another model than the one in force
    with store.transaction() as session:
        found = models.agreement(session, line.id)
    assert found.bmd_g_cm2 is not None
    assert found.tbs is not None
    reach = 1.96 * stdev(differences)
    assert (found.since, found.bmd_g_cm2.n) == (BY.now, 3)
    assert found.bmd_g_cm2.mean == pytest.approx(fmean(differences))
    assert found.bmd_g_cm2.limits == pytest.approx((fmean(differences) - reach, fmean(differences) + reach))
    assert (found.tbs.mean, found.tbs.limits) == (pytest.approx(-0.05), pytest.approx((-0.05, -0.05)))


def test_what_cannot_be_compared_is_not_kept(store: Store, home: Library, tmp_path: Path) -> None:
    line = registered(store, home.keep_run(toy_models.run(tmp_path / "run")))
    half = Shadowed(line.sha256, {"L1": (0.9, 1.2)})
    screened(store, "1.2.1", half)
    screened(store, "1.2.2", replace(says(line, 0.9), model_sha256="f" * 64))  # a model that nobody knows
    with store.transaction() as session:
        assert session.scalars(select(ShadowRow)).all() == []
        found = models.agreement(session, line.id)
    assert (found.since, found.bmd_g_cm2, found.tbs) == (None, None, None)


def test_one_at_a_time_and_only_candidates(store: Store, home: Library, tmp_path: Path) -> None:
    first, second = (registered(store, home.keep_run(toy_models.run(tmp_path / name, name))) for name in ("1", "2"))
    with store.transaction() as session:
        models.begin_shadow(session, first.id, BY, library=home)
        models.begin_shadow(session, second.id, BY, library=home)
        with pytest.raises(models.ModelError, match="not in shadow"):
            models.end_shadow(session, first.id, BY)
        with pytest.raises(models.ModelError, match="candidate"):
            models.begin_shadow(session, models.find(session, "active"), BY, library=home)
    promoted(store, second.id, home)  # what is in force casts no shadow
    with store.transaction() as session:
        assert model.in_shadow(session, home.root) is None
        with pytest.raises(models.ModelError, match="candidate"):
            models.begin_shadow(session, second.id, BY, library=home)
        actions = session.scalars(select(AuditRow.action).order_by(AuditRow.id)).all()
    assert actions[2:] == ["model.shadow.begin", "model.shadow.begin", "model.promote"]

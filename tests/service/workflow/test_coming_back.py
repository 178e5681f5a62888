"""What comes back (our own output, late reports) and what comes along (segmentations by others)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import select

from service.dicom.received import Stored
from service.domain.facts import InstanceFacts
from service.domain.policy import DEFAULT_POLICY
from service.domain.states import JobState
from service.domain.vertebrae import VERTEBRAE
from service.store.engine import Store
from service.store.tables import InstanceRow, JobRow, ResultRow, SeriesRow, StudyRow
from service.workflow import rerun, screening
from service.workflow.screening import job_key, not_screened_document
from tests.service.workflow import workbench
from tests.service.workflow.workbench import Clock, claim, close, deliver, measured, queued, received, slices

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
REPORT = "1.2.840.10008.5.1.4.1.1.88.34"
OLDER_REPORT = "1.2.840.10008.5.1.4.1.1.88.33"
FRAME = "1.2.9"
CODE = {one.name: one.code for one in VERTEBRAE}
ALL = ("L1", "L2", "L3", "L4", "L5")


def other(uid: str, sop_class: str, modality: str, study: str = "1.2.3", **changes: Any) -> InstanceFacts:
    """An object that is no image, in a series of its own."""
    plain = InstanceFacts(study, f"{uid}.0", uid, sop_class, "1.2.840.10008.1.2.1", modality, patient_id="P1")
    return replace(plain, **changes)


def seg(uid: str = "1.2.7", *levels: str, **changes: Any) -> InstanceFacts:
    """A foreign segmentation of these vertebrae (all five where none is named) on the study's CT."""
    codes = tuple(CODE[level] for level in levels or ALL)
    return other(uid, SEG, "SEG", segments=codes, referenced_series_uids=("1.2.3.4",), **changes)


def ours(uid: str = "1.2.6", sop_class: str = REPORT, modality: str = "SR", **changes: Any) -> InstanceFacts:
    """A report (or segmentation) that Osteogate made."""
    return other(uid, sop_class, modality, own_output=True, **changes)


def study(store: Store, uid: str = "1.2.3") -> StudyRow:
    with store.reading() as session:
        row = session.scalars(select(StudyRow).where(StudyRow.study_uid == uid)).one()
        assert row.series is not None  # loaded while the session lives
        return row


def standing(store: Store) -> tuple[str, int, datetime]:
    row = study(store)
    return row.state, row.revision, row.last_received_at


def told(store: Store, series_uid: str) -> list[str]:
    """The codes of a series' reasons; it has been judged."""
    with store.reading() as session:
        row = session.scalars(select(SeriesRow).where(SeriesRow.series_uid == series_uid)).one()
        assert row.eligible is not None
        return [reason["code"] for reason in row.reasons]


def words(store: Store, series_uid: str) -> str:
    with store.reading() as session:
        row = session.scalars(select(SeriesRow).where(SeriesRow.series_uid == series_uid)).one()
        return " ".join(reason["text"] for reason in row.reasons)


def jobs(store: Store) -> list[JobRow]:
    with store.reading() as session:
        return list(session.scalars(select(JobRow).order_by(JobRow.id)))


def results(store: Store) -> list[tuple[int, bool]]:
    """Revision of every result, and whether it is superseded."""
    with store.reading() as session:
        return [(row.revision, row.superseded) for row in session.scalars(select(ResultRow).order_by(ResultRow.id))]


def used(store: Store) -> list[str | None]:
    """The supplied segmentation of every job, by SOP instance UID."""
    with store.reading() as session:
        statement = select(InstanceRow.sop_instance_uid).select_from(JobRow)
        rows = session.scalars(
            statement.outerjoin(InstanceRow, JobRow.segmentation_id == InstanceRow.id).order_by(JobRow.id)
        )
        return list(rows)


def measure(store: Store, clock: Clock, job_id: int, *, by: str = "0" * 64) -> None:
    """Measure with the segmenter whose hash is `by`."""
    held = claim(store, job_id, clock.now)
    assert held is not None
    found = measured()
    found = replace(found, provenance=replace(found.provenance, segmenter_sha256=by))
    with store.transaction() as session:
        screening.record(
            session, held, found, artefacts=None, labelled=False, policy=DEFAULT_POLICY, now=clock.advance(1)
        )


def screened(store: Store, clock: Clock) -> None:
    measure(store, clock, queued(store, clock))


# --- our own output -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["receiving", "queued", "screened", "not-screened"])
def test_our_own_output_changes_nothing_and_is_shown(store: Store, clock: Clock, state: str) -> None:
    deliver(store, slices(kvp=140.0) if state == "not-screened" else slices(), clock.now)
    if state != "receiving":
        close(store, clock.advance(31))
    if state == "screened":
        measure(store, clock, jobs(store)[0].id)
    before = standing(store)
    assert before[0] == state
    back = [ours(), ours("1.2.5", SEG, "SEG")]
    assert deliver(store, back, clock.advance(100)) == [Stored.NEW, Stored.NEW]
    assert deliver(store, back, clock.advance(100)) == [Stored.DUPLICATE, Stored.DUPLICATE]
    assert standing(store) == before
    for one in back:
        assert told(store, one.series_uid) == ["OWN_OUTPUT"]
    assert close(store, clock.now) == (state == "receiving")  # it had been quiet all along
    assert told(store, back[0].series_uid) == ["OWN_OUTPUT"]
    assert len(jobs(store)) == (state != "not-screened")


def test_our_own_output_does_not_keep_a_study_open(store: Store, clock: Clock) -> None:
    deliver(store, slices(), clock.now)
    deliver(store, [ours()], clock.advance(29))
    assert close(store, clock.advance(2)) == 1


def test_a_result_in_force_stays_so(store: Store, clock: Clock) -> None:
    screened(store, clock)
    deliver(store, [ours()], clock.advance(1))
    assert close(store, clock.advance(60)) == 0
    assert results(store) == [(1, False)]


def test_a_study_of_our_own_output_only_is_shown_as_that(store: Store, clock: Clock) -> None:
    """An archive moved our reports back without the images."""
    deliver(store, [ours(), ours("1.2.5", SEG, "SEG")], clock.now)
    assert standing(store)[:2] == ("not-screened", 0)
    with store.reading() as session:
        document = not_screened_document(session.scalars(select(StudyRow)).one())
    assert document is not None
    assert [reason["code"] for reason in document["verdict"]["reasons"]] == ["NO_ELIGIBLE_SERIES", "OWN_OUTPUT"]
    assert close(store, clock.advance(60)) == 0
    # the images do come, later: the study is judged like any other, as its first revision
    deliver(store, slices(), clock.now)
    assert standing(store)[0] == "receiving"
    assert close(store, clock.advance(31)) == 1
    assert standing(store)[:2] == ("queued", 1)
    assert told(store, "1.2.6.0") == ["OWN_OUTPUT"]


def test_images_that_come_with_our_own_output_are_waited_for(store: Store, clock: Clock) -> None:
    deliver(store, [ours(), *slices()], clock.now)
    assert standing(store)[0] == "receiving"


def test_our_own_segmentation_is_never_a_supplied_one(store: Store, clock: Clock) -> None:
    deliver(store, [*slices(), replace(seg(), own_output=True)], clock.now)
    close(store, clock.advance(31))
    assert used(store) == [None]
    assert told(store, "1.2.7.0") == ["OWN_OUTPUT"]


def test_what_joins_the_measured_series_is_judged_whatever_it_is(store: Store, clock: Clock) -> None:
    """The worker measures every instance of the series: nothing may slip in unjudged."""
    screened(store, clock)
    deliver(store, [ours(series_uid="1.2.3.4")], clock.advance(1))
    assert standing(store)[0] == "receiving"
    close(store, clock.advance(31))
    assert standing(store)[0] == "not-screened"


# --- reports by others ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sop_class", [REPORT, OLDER_REPORT])
def test_a_late_report_by_others_reopens_nothing_and_is_judged(store: Store, clock: Clock, sop_class: str) -> None:
    screened(store, clock)
    before = standing(store)
    deliver(store, [other("1.2.8", sop_class, "SR")], clock.advance(1))
    assert standing(store) == before
    codes = told(store, "1.2.8.0")
    assert codes[:2] == ["NOT_CT", "SOP_CLASS_UNSUPPORTED"]
    # judged at a close, it would be told the same
    deliver(store, slices(n=61), clock.advance(1))
    close(store, clock.advance(31))
    assert told(store, "1.2.8.0") == codes


def test_a_report_in_a_receiving_study_is_judged_with_it(store: Store, clock: Clock) -> None:
    deliver(store, [other("1.2.8", OLDER_REPORT, "SR"), *slices()], clock.now)
    with store.reading() as session:
        assert set(session.scalars(select(SeriesRow.eligible))) == {None}
    close(store, clock.advance(31))
    assert "NOT_CT" in told(store, "1.2.8.0")


# --- segmentations by others ----------------------------------------------------------------------------------


def test_the_key_knows_the_segmentation() -> None:
    instances = [("1.2.1", "a" * 64)]
    keys = {
        job_key("1.2", instances, "m"),
        job_key("1.2", instances, "m", ("1.2.7", "b" * 64)),
        job_key("1.2", instances, "m", ("1.2.7", "c" * 64)),
        job_key("1.2", instances, "m", ("1.2.8", "b" * 64)),
    }
    assert len(keys) == 4


def test_a_segmentation_that_comes_with_the_study_is_measured_with(store: Store, clock: Clock) -> None:
    facts = seg(frame_of_reference_uid=FRAME)
    deliver(store, [facts, *slices(frame_of_reference_uid=FRAME)], clock.now)
    assert close(store, clock.advance(31)) == 1
    assert used(store) == ["1.2.7"]
    assert told(store, "1.2.7.0") == ["SEGMENTATION_USED"]
    assert "L1, L2, L3, L4, L5" in words(store, "1.2.7.0")
    [job] = jobs(store)
    with store.reading() as session:
        assert screening.segmentation_path(session, job.id) == received(facts, clock.now).path
    assert "1.2.7" not in (study(store).choice or "")  # the choice among series is among images


def test_one_that_comes_after_the_result_makes_a_new_revision(store: Store, clock: Clock) -> None:
    screened(store, clock)
    deliver(store, [seg()], clock.advance(5))
    assert results(store) == [(1, False)]
    assert close(store, clock.advance(31)) == 1
    assert standing(store)[:2] == ("queued", 2)
    assert used(store) == [None, "1.2.7"]
    assert results(store) == [(1, True)]
    measure(store, clock, jobs(store)[1].id, by=received(seg(), clock.now).sha256)
    assert results(store) == [(1, True), (2, False)]
    assert told(store, "1.2.7.0") == ["SEGMENTATION_USED"]


def test_one_that_comes_while_the_worker_measures_fences_it_off(store: Store, clock: Clock) -> None:
    held = claim(store, queued(store, clock), clock.now)
    assert held is not None
    deliver(store, [seg()], clock.advance(5))
    close(store, clock.advance(31))
    assert [job.state for job in jobs(store)] == [JobState.SUPERSEDED.value, JobState.WAITING.value]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (other("1.2.7", SEG, "SEG", segments=("SCT:10200004",)), "none of L1 to L5"),
        (seg(frame_of_reference_uid="1.2.8"), "another frame of reference"),
        (replace(seg(), referenced_series_uids=("1.2.3.5",)), "another series"),
    ],
)
def test_one_that_cannot_be_used_leaves_the_result_standing(
    store: Store, clock: Clock, facts: InstanceFacts, why: str
) -> None:
    deliver(store, slices(frame_of_reference_uid=FRAME), clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[0].id)
    deliver(store, [facts], clock.advance(5))
    assert close(store, clock.advance(31)) == 1
    assert standing(store)[:2] == ("screened", 2)
    assert len(jobs(store)) == 1
    assert results(store) == [(1, False)]
    assert told(store, "1.2.7.0") == ["SEGMENTATION_NOT_USED"]
    assert why in words(store, "1.2.7.0")


def test_a_better_one_supersedes_and_a_worse_one_does_not(store: Store, clock: Clock) -> None:
    deliver(store, [seg("1.2.7", "L1", "L2"), *slices()], clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[0].id, by=received(seg("1.2.7"), clock.now).sha256)
    deliver(store, [seg("1.2.8", "L3")], clock.advance(5))
    close(store, clock.advance(31))
    assert used(store) == ["1.2.7"]
    assert told(store, "1.2.8.0") == ["SEGMENTATION_NOT_USED"]
    deliver(store, [seg("1.2.9", "L1", "L2", "L3")], clock.advance(5))
    close(store, clock.advance(31))
    assert used(store) == ["1.2.7", "1.2.9"]
    assert told(store, "1.2.7.0") == ["SEGMENTATION_NOT_USED"]
    assert "Another segmentation was used" in words(store, "1.2.7.0")
    assert told(store, "1.2.9.0") == ["SEGMENTATION_USED"]


def test_one_without_a_ct_is_told_so(store: Store, clock: Clock) -> None:
    deliver(store, [seg()], clock.now)
    close(store, clock.advance(31))
    assert standing(store)[:2] == ("not-screened", 1)
    assert "No CT series" in words(store, "1.2.7.0")


def test_one_that_came_with_two_contents_is_not_used(store: Store, clock: Clock) -> None:
    deliver(store, [seg(), *slices()], clock.now)
    deliver(store, [seg()], clock.now, content="other")
    close(store, clock.advance(31))
    assert used(store) == [None]
    assert "arrived again" in words(store, "1.2.7.0")


def test_one_that_the_worker_could_not_use_is_shown_as_that(store: Store, clock: Clock) -> None:
    """Its header promised more than its pixels kept; the next close does not promise it again."""
    deliver(store, [seg(), *slices()], clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[0].id, by="0" * 64)  # by our own networks
    assert told(store, "1.2.7.0") == ["SEGMENTATION_NOT_USED"]
    assert "the notes of the result say why" in words(store, "1.2.7.0")
    deliver(store, slices(series="1.2.3.9", n=1, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER")), clock.advance(5))
    close(store, clock.advance(31))
    assert (standing(store)[:2], results(store)) == (("screened", 2), [(1, False)])
    assert told(store, "1.2.7.0") == ["SEGMENTATION_NOT_USED"]


def test_a_rerun_measures_with_the_same_segmentation(store: Store, clock: Clock) -> None:
    deliver(store, [seg(), *slices()], clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[0].id)
    with store.transaction() as session:
        rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
    assert used(store) == ["1.2.7", "1.2.7"]


def test_what_comes_late_and_changes_nothing_leaves_the_rerun_in_force(store: Store, clock: Clock) -> None:
    localizer = slices(series="1.2.3.9", n=2, image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))
    deliver(store, slices(), clock.now)
    close(store, clock.advance(31))
    measure(store, clock, jobs(store)[0].id)
    with store.transaction() as session:
        again = rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
    measure(store, clock, again)
    deliver(store, localizer[:1], clock.advance(5))
    close(store, clock.advance(31))
    assert (standing(store)[:2], results(store)) == (("screened", 2), [(1, True), (1, False)])
    with store.transaction() as session:
        failed = rerun.rerun(session, "1.2.3", actor="dr", now=clock.now)
        session.get_one(JobRow, failed).state = JobState.QUARANTINED.value
    deliver(store, localizer[1:], clock.advance(5))
    close(store, clock.advance(31))
    assert (standing(store)[:2], results(store)) == (("screened", 3), [(1, True), (1, False)])


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_arrival_of_slices_and_segmentation_is_of_no_matter(
    store: Store, clock: Clock, order: int
) -> None:
    workbench.deliver(store, [seg(), *slices()][::order], clock.now)
    close(store, clock.advance(31))
    pair = (seg().sop_instance_uid, received(seg(), clock.now).sha256)
    instances = [(one.sop_instance_uid, received(one, clock.now).sha256) for one in slices()]
    assert [job.key for job in jobs(store)] == [job_key("1.2.3.4", instances, workbench.MODEL, pair)]

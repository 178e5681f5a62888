"""The pipeline with a segmentation that others supplied: measured with, or left aside with the reason."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import torch
from scipy import ndimage

from models.crop import Vertebra, locate
from models.package import Scanner
from models.readout import ScannerFactors, widened
from service.domain.reasons import Code, Reason
from service.domain.renumber import shifted
from service.domain.result import Anatomy, Measurements, Numbering, Renumbering
from service.settings import Settings
from service.workflow import artefacts
from service.workflow.model import in_force_here
from tests.foreign_seg import write_foreign_seg
from worker import anatomy as anatomy_room
from worker.jobs import ScreenRequest
from worker.located import Located
from worker.pipeline import LABEL_IDS, Pipeline
from worker.predict import DeviceError, Predictor
from worker.segmentation import Segmentation, SegmentationError
from worker.segmentation.base import L5, L6, T12, LabelArray
from worker.segmentation.renamed import KeptLabels
from worker.start import load_predictor, make_pipeline
from worker.volume import Volume, load_dicom, load_label_map

FloatArray = npt.NDArray[np.float64]
EMPTY = "an empty network"


@dataclass(frozen=True)
class FindsNothing:
    """Our own networks' place, taken by something quick that finds no spine."""

    name: str = EMPTY
    sha256: str = "e" * 64

    def segment(self, volume: Volume) -> Segmentation:
        return Segmentation(np.zeros(volume.hu.shape, dtype=np.uint8), self.name, self.sha256)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    loaded = make_pipeline(Settings(data_dir=tmp_path_factory.mktemp("settings")))
    return Pipeline(FindsNothing(), loaded.predictor, loaded.device)


@pytest.fixture(scope="module")
def seg(digital_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign_seg(
        sorted((digital_study / "dicom").glob("*.dcm")),
        digital_study / "labels.nii.gz",
        tmp_path_factory.mktemp("seg") / "0123abcd.dcm",
    )


@pytest.fixture(scope="module")
def volume(digital_study: Path) -> Volume:
    return load_dicom(sorted((digital_study / "dicom").glob("*.dcm")))


def measure(pipeline: Pipeline, volume: Volume, out: Path, segmentation: Path | None) -> Measurements:
    out.mkdir(exist_ok=True)
    return pipeline.run(volume, out, supplied=segmentation)[0]


def changed(seg: Path, target: Path, **elements: object) -> Path:
    dataset = pydicom.dcmread(seg)
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    dataset.save_as(target)
    return target


def test_a_supplied_segmentation_takes_the_networks_place(
    pipeline: Pipeline, digital_study: Path, seg: Path, tmp_path: Path
) -> None:
    paths = tuple(sorted((digital_study / "dicom").glob("*.dcm")))
    measured = pipeline.screen(ScreenRequest(paths, tmp_path, seg))
    made = measured.provenance
    assert made.segmenter is not None
    assert made.segmenter.startswith("supplied DICOM SEG by ")
    assert str(pydicom.dcmread(seg, stop_before_pixels=True).SOPInstanceUID) in made.segmenter
    assert "A foreign maker" in made.segmenter
    assert made.segmenter_sha256 is not None
    assert made.segmenter_sha256 != FindsNothing.sha256
    assert [level.level for level in measured.valid_levels()] == ["L1", "L2", "L3", "L4"]
    kept = artefacts.labels(tmp_path)  # what the steward makes our segmentation object of
    assert kept.shape[0] == len(paths)
    assert {28, 29, 30, 31} <= set(np.unique(kept).tolist())
    assert not any("supplied" in note for note in measured.anatomy.notes)


def test_a_predictor_that_tells_scanners_apart_hears_which_one_it_was(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path
) -> None:
    # as a training run's manifest would name it
    assert volume.scanner == Scanner("siemens SOMATOM Force", digital=True)
    before = measure(pipeline, volume, tmp_path / "before", seg)
    for name, gain in (("siemens SOMATOM Force", 1.1), ("canon Aquilion ONE", 1.0)):
        measured = measure(replace(pipeline, predictor=fitted_to(pipeline, name)), volume, tmp_path / name, seg)
        assert measured.model_knows_scanner is (gain > 1)
        assert measured.patient_bmd_interval is not None
        low, high = measured.patient_bmd_interval
        half = pipeline.predictor.package.manifest.interval(4).bmd_g_cm2
        unsure = 0.0 if gain > 1 else 0.1 * (high + low) / 2
        assert (high - low) / 2 == pytest.approx(widened(half, unsure), abs=2e-4)
        for level in measured.valid_levels():
            was = before.levels[level.level].bmd_g_cm2
            assert was is not None
            assert level.bmd_g_cm2 == pytest.approx(gain * was, abs=2e-4)
    assert before.model_knows_scanner


def fitted_to(pipeline: Pipeline, scanner: str) -> Predictor:
    """The predictor as if it had been fitted to this scanner, which reads 10 % low, as others may read 10 % off."""
    usual = pipeline.predictor
    assert usual.readout is not None
    fitted = copy.copy(usual)
    known = {scanner: ScannerFactors(np.array([1.1, 1.0]), 40)}
    fitted.readout = replace(usual.readout, scanners=known, between=np.array([0.1, 0.0]))
    return fitted


def test_each_vertebra_is_located_once_and_the_results_are_the_same(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(labels: LabelArray, affine: FloatArray, label_id: int) -> Vertebra:
        asked.append(label_id)
        return locate(labels, affine, label_id)

    def anew(self: Located, label_id: int) -> Vertebra:
        return counted(self.labels, self.affine, label_id)

    monkeypatch.setattr("worker.located.locate", counted)
    once = measure(pipeline, volume, tmp_path / "once", seg)
    assert len(once.valid_levels()) == 4
    assert len(asked) == len(set(asked))  # findings and crop share them
    assert set(LABEL_IDS.values()) <= set(asked)
    asked.clear()
    monkeypatch.setattr(Located, "vertebra", anew)
    twice = measure(pipeline, volume, tmp_path / "twice", seg)
    assert len(asked) == len(set(asked)) + 4
    assert replace(once, timings_s={}) == replace(twice, timings_s={})


def test_without_one_our_own_networks_segment(pipeline: Pipeline, volume: Volume, tmp_path: Path) -> None:
    measured = measure(pipeline, volume, tmp_path, None)
    assert (measured.provenance.segmenter, measured.valid_levels()) == (EMPTY, [])
    assert not any("supplied" in note for note in measured.anatomy.notes)


@pytest.mark.parametrize(
    ("elements", "why"),
    [
        ({"FrameOfReferenceUID": "1.2.3"}, "frame of reference is not the CT's"),
        ({"SegmentationType": "FRACTIONAL"}, "FRACTIONAL"),
        ({"NumberOfFrames": 3}, "descriptions of frames"),
    ],
)
def test_an_unusable_one_is_left_aside_and_named(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path, elements: dict[str, object], why: str
) -> None:
    broken = changed(seg, tmp_path / "89abcdef.dcm", **elements)
    measured = measure(pipeline, volume, tmp_path / "out", broken)
    assert measured.provenance.segmenter == EMPTY
    note = measured.anatomy.notes[0]
    assert note.startswith(f"The supplied segmentation {pydicom.dcmread(broken).SOPInstanceUID} by A foreign maker ")
    assert why in note
    assert "89abcdef" not in note  # a name of the spool tells nobody anything


@pytest.mark.parametrize(
    ("left_out", "lacking"),
    [
        (("L5",), "does not outline L5,"),
        (("S1", "sacrum"), "does not outline the sacrum,"),
        (("T12", "L1", "L2", "L4", "L5", "S1", "sacrum"), "does not outline T12, L1, L2, L4, L5, the sacrum,"),
    ],
)
def test_one_that_outlines_too_little_does_not_spoil_the_study(
    pipeline: Pipeline, digital_study: Path, volume: Volume, tmp_path: Path, left_out: tuple[str, ...], lacking: str
) -> None:
    """Its levels could not be checked: alone it would make every CT not assessable."""
    files = sorted((digital_study / "dicom").glob("*.dcm"))
    partial = write_foreign_seg(files, digital_study / "labels.nii.gz", tmp_path / "1.dcm", leave_out=left_out)
    measured = measure(pipeline, volume, tmp_path / "out", partial)
    assert measured.provenance.segmenter == EMPTY
    assert lacking in measured.anatomy.notes[0]


def recoded(seg: Path, target: Path, codes: Mapping[str, str]) -> Path:
    """A segmentation some of whose segments carry another one's code."""
    dataset = pydicom.dcmread(seg)
    known = {item.SegmentLabel: item.SegmentedPropertyTypeCodeSequence for item in dataset.SegmentSequence}
    for item in dataset.SegmentSequence:
        other = codes.get(item.SegmentLabel.removesuffix(" outlined"))
        if other:
            item.SegmentedPropertyTypeCodeSequence = known[f"{other} outlined"]
    dataset.save_as(target)
    return target


def test_one_whose_levels_fail_the_checks_is_not_used(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path
) -> None:
    swapped = recoded(seg, tmp_path / "swapped.dcm", {"L2": "L3", "L3": "L2"})
    measured = measure(pipeline, volume, tmp_path / "out", swapped)
    assert measured.provenance.segmenter == EMPTY
    assert "its levels do not pass the checks" in measured.anatomy.notes[0]
    assert "not in anatomical order" in measured.anatomy.notes[0]


def test_one_whose_outlines_are_bad_is_not_used(
    pipeline: Pipeline, digital_study: Path, volume: Volume, tmp_path: Path
) -> None:
    """Rightly named, in order, of plausible size and place: but bone does not end where these outlines do."""
    image = nibabel.load(digital_study / "labels.nii.gz")
    inside = ndimage.distance_transform_edt(np.asarray(image.dataobj) > 0, sampling=image.header.get_zooms())
    tight = np.where(inside > 3.0, np.asarray(image.dataobj), 0).astype(np.uint8)
    nibabel.save(nibabel.Nifti1Image(tight, image.affine), tmp_path / "tight.nii.gz")
    measured = measure(pipeline, volume, tmp_path / "out", tmp_path / "tight.nii.gz")
    assert measured.provenance.segmenter == EMPTY
    assert "was not used" in measured.anatomy.notes[0]


def test_kept_outlines_are_measured_again_under_a_persons_names(
    pipeline: Pipeline, digital_study: Path, volume: Volume, tmp_path: Path
) -> None:
    """Nothing is segmented: the networks here would find nothing. Who outlined the vertebrae stays who it was."""
    first, second = tmp_path / "1-1", tmp_path / "2-1"
    first.mkdir()
    second.mkdir()
    truth = load_label_map(digital_study / "labels.nii.gz", volume)
    names = np.arange(256, dtype=np.uint8)
    names[L5 : T12 + 3] = [L6, *range(L5, T12 + 2)]  # every level called as the one below it
    artefacts.keep_labels(first, names[truth], {28}, {28: 0.5})
    told = Renumbering(shifted(-1), "dr", "2026-11-28T07:00:00+00:00", "ribs on the scout")
    kept = KeptLabels(first, "who outlined", "d" * 64, told)
    paths = tuple(sorted((digital_study / "dicom").glob("*.dcm")))
    measured = pipeline.screen(ScreenRequest(paths, second, None, kept))
    assert (measured.provenance.segmenter, measured.provenance.segmenter_sha256) == ("who outlined", "d" * 64)
    assert measured.anatomy.renumbered is not None
    assert measured.anatomy.renumbered.levels["L2"] == "L1"
    assert "named by dr" in measured.anatomy.notes[0]
    assert measured.anatomy.numbering is Numbering.CERTAIN, measured.anatomy.notes
    assert [level.level for level in measured.valid_levels()] == ["L1", "L2", "L3", "L4"]
    assert artefacts.overlaps(second) == {29: 0.5}
    assert np.array_equal(artefacts.labels(second), truth)


def test_kept_outlines_of_another_grid_are_refused(volume: Volume, tmp_path: Path) -> None:
    artefacts.keep_labels(tmp_path, np.full((3, 4, 5), 28, dtype=np.uint8), {28})
    kept = KeptLabels(tmp_path, "who outlined", "d" * 64, Renumbering(shifted(1), "dr", "2026-11-28", "seen"))
    with pytest.raises(SegmentationError, match="kept outlines"):
        kept.segment(volume)


@pytest.mark.parametrize("share", [0.02, 0.98])
def test_a_truncated_one_costs_the_study_nothing(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path, share: float
) -> None:
    whole = seg.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: int(share * len(whole))])
    measured = measure(pipeline, volume, tmp_path / "out", tmp_path / "cut.dcm")
    assert measured.provenance.segmenter == EMPTY
    assert "was not used" in measured.anatomy.notes[0]


def test_a_spool_that_cannot_be_read_is_no_verdict_on_the_segmentation(
    pipeline: Pipeline, volume: Volume, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"gone\.dcm"):
        measure(pipeline, volume, tmp_path, tmp_path / "gone.dcm")


def test_the_sites_limits_for_findings_reach_the_worker(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[findings]\ncobb_severe_deg = 30\n", encoding="utf-8")
    loaded = make_pipeline(Settings(data_dir=tmp_path, policy_file=policy))
    assert loaded.limits.cobb_severe_deg == 30.0


def test_the_sites_precision_reaches_the_worker_and_is_refused_where_it_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Settings(data_dir=tmp_path, device="cpu", prediction_precision="bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(DeviceError, match="bf16"):
        make_pipeline(site)
    with pytest.raises(DeviceError, match="bf16"):
        load_predictor(in_force_here(site), site)


def test_a_model_passed_the_gate_only_on_the_scanners_that_judged_it(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path
) -> None:
    """At the command line as in the service: elsewhere its values only stand beside the decision."""
    here = volume.scanner.name
    for judged_on, passed in ((None, True), ((here,), True), (("ge Elsewhere",), False), ((), False)):
        told = replace(pipeline, gate_passed=True, judged_on=judged_on)
        assert measure(told, volume, tmp_path, seg).model_gate_passed is passed
    assert not measure(replace(pipeline, judged_on=(here,)), volume, tmp_path, seg).model_gate_passed


def test_the_patients_interval_is_that_of_the_levels_that_count(
    pipeline: Pipeline, volume: Volume, seg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A level that is left out has its own values, and no share in the patient's."""
    assess = anatomy_room.assess

    def without_l2(*given: object, **named: object) -> Anatomy:
        found = assess(*given, **named)  # type: ignore[arg-type]
        out = replace(found.levels["L2"], exclusions=(Reason(Code.FRACTURE, "left out"),))
        return replace(found, levels={**found.levels, "L2": out})

    monkeypatch.setattr(anatomy_room, "assess", without_l2)
    measured = measure(pipeline, volume, tmp_path, seg)
    counting = measured.valid_levels()
    assert [level.level for level in counting] == ["L1", "L3", "L4"]
    assert measured.levels["L2"].bmd_g_cm2 is not None
    half = pipeline.predictor.package.manifest.interval(3)
    bmd, tbs = (np.mean([getattr(level, name) for level in counting]) for name in ("bmd_g_cm2", "tbs"))
    assert measured.patient_bmd_interval == pytest.approx((bmd - half.bmd_g_cm2, bmd + half.bmd_g_cm2), abs=2e-4)
    assert measured.patient_tbs_interval == pytest.approx((tbs - half.tbs, tbs + half.tbs), abs=2e-4)

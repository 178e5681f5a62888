"""The result as a Comprehensive 3D SR (PS3.3 A.35.13) after TID 1500: unverified, partial, preliminary.

One measurement group per vertebra, on its segment; one for the patient, with the recommendation. What is absent in
the result is absent here. Values of a vertebra that does not count, or of a CT that is not assessable, are left out:
whoever reads the numbers alone must not find one that the decision did not use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    NumContentItem,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    RelationshipTypeValues,
    TextContentItem,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as public
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian

from service.dicom.reports import codes
from service.dicom.reports.seg import SHORT, report_key, segment_numbers
from service.dicom.reports.source import (
    ReportError,
    clean_headers,
    coding_scheme,
    finish,
    is_synthetic,
    plain,
    writable,
)
from service.dicom.reports.uids import (
    DISCLAIMER,
    MANUFACTURER,
    MODEL_NAME,
    Kind,
    ReportKey,
    hashed_uid,
    series_uid,
)
from service.domain.criteria import Scale, cuts_on
from service.domain.figures import digits_beside
from service.domain.policy import ReferralPolicy
from service.domain.result import NO_FLAG_RULES_NOTHING_OUT, Category
from service.domain.supplied import is_supplied

SERIES_NUMBER = 9902
SERIES_DESCRIPTION = "Osteogate report (investigational)"
NOT_ASSESSABLE, REFER = Category.NOT_ASSESSABLE.value, Category.REFER.value
INTERVALS = "The uncertainty of a predicted value is the model's 90 % prediction interval."
SHIFTS = "The uncertainty of the attenuation is its change when the measured disc is moved by 3 mm."
SYNTHETIC_ONLY = "The network was validated on digital patients only."
PATIENT = "Patient"

# Digits of a value: as the pages and the reasons tell it, BMD and TBS as densitometers do; more beside a cut.
DIGITS: Mapping[Code, int] = {
    codes.MEAN_ATTENUATION: 1,
    codes.BMD: 3,
    codes.TBS: 3,
    codes.PERCENT_YAM: 1,
    codes.T_SCORE: 2,
}

Group = MeasurementsAndQualitativeEvaluations | VolumetricROIMeasurementsAndQualitativeEvaluations


@dataclass(frozen=True)
class Context:
    """What every part of one report is made from."""

    result: Mapping[str, Any]
    source: Dataset  # one slice: its character set holds every text
    segmentation: Dataset | None
    key: ReportKey
    reference: str | None

    @property
    def assessable(self) -> bool:
        """Whether any number may leave the house."""
        return bool(self.result["decision"]["category"] != NOT_ASSESSABLE)

    def text(self, concept: Code, value: str) -> TextContentItem:
        """One TEXT item below a container."""
        plain = writable(value, self.source)
        return TextContentItem(name=concept, value=plain, relationship_type=RelationshipTypeValues.CONTAINS)

    def tracking(self, name: str) -> TrackingIdentifier:
        """The same identifier as the segment has, where there is one."""
        return TrackingIdentifier(uid=self.key.uid(Kind.TRACKING, name), identifier=name)


def make_structured_report(
    source: Sequence[Dataset],
    segmentation: Dataset | None,
    result: Mapping[str, Any],
    *,
    at: datetime,
    run: int = 0,
    reference: str | None = None,
    replaces: Sequence[Dataset] = (),
) -> Dataset:
    """The report on one result; a CT that is not assessable gets one too, with the reasons and without numbers.

    Args:
        source: the headers of the slices that were measured; at least one.
        segmentation: what `make_segmentation` made of them; None where nothing was segmented.
        result: result.json (`service.domain.result.result_document`).
        at: when the result was made, in the site's local time.
        run: as for `make_segmentation`.
        reference: the young-adult reference behind %YAM and T, in words, with its source.
        replaces: earlier reports of ours (headers) that this one supersedes.
    """
    if not source:
        raise ReportError("there are no source slices")
    headers = clean_headers(source)
    _check(source, segmentation, result)
    revision = result["revision"] or 1
    key = report_key(source, result["provenance"], revision, run)
    context = Context(result, source[0], segmentation, key, reference)
    evidence = [*headers, *([] if segmentation is None else [segmentation])]
    made = Comprehensive3DSR(
        evidence=evidence,
        content=_content(context)[0],
        series_instance_uid=series_uid(Kind.REPORT, key.study_uid, None),
        series_number=SERIES_NUMBER,
        series_description=SERIES_DESCRIPTION,
        sop_instance_uid=key.uid(Kind.REPORT),
        instance_number=max(revision, 1),
        manufacturer=MANUFACTURER,
        manufacturer_model_name=MODEL_NAME,
        software_versions=str(result["provenance"]["software"]),
        device_serial_number="1",
        is_complete=False,
        is_final=False,
        is_verified=False,
        previous_versions=list(replaces) or None,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=None,
        coding_schemes=[coding_scheme()],
    )
    return finish(made, source[0], synthetic=is_synthetic(source), at=at)


def _check(source: Sequence[Dataset], segmentation: Dataset | None, result: Mapping[str, Any]) -> None:
    study = str(source[0].StudyInstanceUID)
    if result["study_uid"] not in (None, study):
        raise ReportError("the result is of another study than the source slices")
    if segmentation is not None and str(segmentation.StudyInstanceUID) != study:
        raise ReportError("the segmentation is of another study than the source slices")


def _content(context: Context) -> MeasurementReport:
    groups = [group for level in context.result["levels"] if (group := _level_group(context, level)) is not None]
    report = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer()),
        procedure_reported=codes.PROCEDURE,
        imaging_measurements=[_patient_group(context), *groups],
        title=public.DCM.ImagingMeasurementReport,
    )
    root = report[0].ContentSequence
    measurements = root.pop()  # what a reader must know comes before the numbers
    for comment in (DISCLAIMER, *_comments(context)):
        root.append(context.text(codes.COMMENT, comment))
    root.append(measurements)
    return report


def _comments(context: Context) -> list[str]:
    flagged = context.result["decision"]["category"] == REFER
    return [
        *([] if flagged else [NO_FLAG_RULES_NOTHING_OUT]),
        *([INTERVALS, SHIFTS] if context.assessable else []),
        *([SYNTHETIC_ONLY] if context.result["provenance"].get("model_synthetic_only") else []),
    ]


def _observer() -> ObserverContext:
    attributes = DeviceObserverIdentifyingAttributes(
        uid=hashed_uid(Kind.DEVICE, MODEL_NAME),
        name=MANUFACTURER,
        manufacturer_name=MANUFACTURER,
        model_name=MODEL_NAME,
    )
    return ObserverContext(observer_type=public.DCM.Device, observer_identifying_attributes=attributes)


# One vertebra


def _level_group(context: Context, level: str) -> Group | None:
    """The group of one vertebra; None where it was neither found nor spoken of."""
    values = context.result["levels"][level]
    number = segment_numbers(context.segmentation).get(level) if context.segmentation is not None else None
    if number is None and not values["exclusions"] and not values["valid"]:
        return None
    parts: dict[str, Any] = {
        "tracking_identifier": context.tracking(level),
        "finding_category": codes.ANATOMICAL_STRUCTURE,
        "finding_sites": [FindingSite(codes.VERTEBRAE[level])],
        "algorithm_id": _segmenter(context.result["provenance"]),
        "measurements": _level_measurements(context, values),
        "qualitative_evaluations": _use(values),
    }
    if number is None or context.segmentation is None:
        group: Group = MeasurementsAndQualitativeEvaluations(**parts)
    else:
        segment = ReferencedSegment.from_segmentation(context.segmentation, number)
        group = VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=segment, **parts)
    for reason in values["exclusions"]:
        group[0].ContentSequence.append(context.text(codes.EXCLUSION, _sentence(reason)))
    return group


def _use(values: Mapping[str, Any]) -> list[QualitativeEvaluation]:
    used = QualitativeEvaluation(codes.VALIDITY, codes.VALID if values["valid"] else codes.EXCLUDED)
    reasons = [QualitativeEvaluation(codes.EXCLUSION, codes.reason_code(one["code"])) for one in values["exclusions"]]
    return [used, *reasons]


def _level_measurements(context: Context, values: Mapping[str, Any]) -> list[Measurement]:
    if not values["valid"] or not context.assessable:
        return []
    network = _network(context.result["provenance"])
    return _kept(
        _measurement(
            codes.MEAN_ATTENUATION,
            values["hu_mean"],
            codes.HOUNSFIELD,
            values.get("hu_shift_range"),
            derivation=codes.MEAN,
        ),
        _measurement(codes.BMD, values["bmd_g_cm2"], codes.G_CM2, values["bmd_interval"], algorithm=network),
        _measurement(codes.TBS, values["tbs"], codes.ONE, values["tbs_interval"], algorithm=network),
    )


# The patient


def _patient_group(context: Context) -> MeasurementsAndQualitativeEvaluations:
    decision = context.result["decision"]
    group = MeasurementsAndQualitativeEvaluations(
        tracking_identifier=context.tracking(PATIENT),
        finding_sites=[FindingSite(codes.LUMBAR_SPINE)],
        algorithm_id=_software(context.result["provenance"]),
        measurements=_patient_measurements(context),
        qualitative_evaluations=[
            QualitativeEvaluation(codes.RECOMMENDATION, codes.CATEGORIES[decision["category"]]),
            QualitativeEvaluation(codes.DRIVER, codes.DRIVERS[decision["driver"]]),
        ],
    )
    group[0].ContentSequence.extend([context.text(concept, value) for concept, value in _statements(context.result)])
    return group


def _patient_measurements(context: Context) -> list[Measurement]:
    if not context.assessable:
        return []
    values, network = context.result["patient"], _network(context.result["provenance"])
    means = _kept(
        _measurement(codes.MEAN_ATTENUATION, values["hu_mean"], codes.HOUNSFIELD, None, derivation=codes.MEAN),
        _measurement(codes.BMD, values["bmd_g_cm2"], codes.G_CM2, values["bmd_interval"], codes.MEAN, network),
        _measurement(codes.TBS, values["tbs"], codes.ONE, values["tbs_interval"], codes.MEAN, network),
    )
    relations = _kept(
        _measurement(codes.PERCENT_YAM, values["percent_yam"], codes.PERCENT, None, algorithm=network),
        _measurement(codes.T_SCORE, values["t_score"], codes.ONE, None, algorithm=network),
    )
    if context.reference is not None:
        authority = writable(context.reference, context.source)
        for relation in relations:
            _add_property(relation, TextContentItem(codes.REFERENCE_AUTHORITY, authority, _PROPERTY))
    return [*means, *relations]


def _statements(result: Mapping[str, Any]) -> list[tuple[Code, str]]:
    """What a person reads beside the numbers, each under its own concept."""
    decision, anatomy, used = result["decision"], result["anatomy"], result["patient"]["levels_used"]
    reasons = [*result["verdict"]["reasons"], *decision["reasons"]]
    sentences = dict.fromkeys(_sentence(reason) for reason in reasons)  # a reason may stand in both
    return [
        *((codes.REASON, sentence) for sentence in sentences),
        *([(codes.LEVELS_USED, ", ".join(used))] if used else []),
        (codes.NUMBERING, anatomy["numbering"]),
        *((codes.NOTE, note) for note in anatomy["notes"]),
        (codes.POLICY, decision["policy"]),
    ]


# Parts


_PROPERTY = RelationshipTypeValues.HAS_PROPERTIES


def _sentence(reason: Mapping[str, str]) -> str:
    return f"{reason['code']}: {reason['text']}"


def _kept(*measurements: Measurement | None) -> list[Measurement]:
    return [one for one in measurements if one is not None]


def _measurement(
    name: Code,
    value: float | None,
    unit: Code,
    interval: Sequence[float] | None,
    derivation: Code | None = None,
    algorithm: AlgorithmIdentification | None = None,
) -> Measurement | None:
    """TID 300; the interval as signed distances from the value (TID 310), in the value's own unit."""
    if value is None:
        return None
    digits = digits_beside(value, _cuts(name), DIGITS[name])
    told = round(value, digits)
    made = Measurement(name=name, value=told, unit=unit, derivation=derivation, algorithm_id=algorithm)
    if interval is not None:
        low, high = (round(bound, digits) for bound in interval)
        for concept, distance in ((codes.UPPER_UNCERTAINTY, high - told), (codes.LOWER_UNCERTAINTY, told - low)):
            _add_property(made, NumContentItem(concept, round(distance, digits), unit, relationship_type=_PROPERTY))
    return made


def _cuts(name: Code) -> tuple[float, ...]:
    """The published cuts on a value's own scale, which rounding must not cross."""
    published = ReferralPolicy()
    return {
        codes.MEAN_ATTENUATION: (published.hu_refer, published.hu_no_flag),
        codes.TBS: (published.tbs_impaired,),
        codes.PERCENT_YAM: cuts_on(Scale.PERCENT_YAM),
        codes.T_SCORE: cuts_on(Scale.T_SCORE),
    }.get(name, ())


def _add_property(measurement: Measurement, item: NumContentItem | TextContentItem) -> None:
    """Append below the NUM item; order among properties has no meaning (TID 300)."""
    number = measurement[0]
    if "ContentSequence" not in number:
        number.ContentSequence = []
    number.ContentSequence.append(item)


def _network(provenance: Mapping[str, Any]) -> AlgorithmIdentification | None:
    """The model's name, as "reference-0.1.0", and the hash of its weights."""
    if not provenance["model"]:
        return None
    name, _, version = str(provenance["model"]).rpartition("-")
    return _algorithm(name or version, version, provenance["model_sha256"])


def _segmenter(provenance: Mapping[str, Any]) -> AlgorithmIdentification:
    if not provenance["segmenter"]:
        return _software(provenance)
    if is_supplied(provenance["segmenter"]):  # neither made by us nor, for all we know, by a network
        sha256 = str(provenance["segmenter_sha256"])
        return AlgorithmIdentification(plain(provenance["segmenter"]), sha256[:SHORT], parameters=[f"sha256={sha256}"])
    return _algorithm(provenance["segmenter"], provenance["software"], provenance["segmenter_sha256"])


def _software(provenance: Mapping[str, Any]) -> AlgorithmIdentification:
    name, _, version = str(provenance["software"]).partition(" ")
    parts = ("model", "model_sha256", "segmenter", "segmenter_sha256", "device", "engine")
    named = [plain(f"{part}={provenance[part]}") for part in parts if provenance.get(part)]
    return AlgorithmIdentification(
        name=name, version=version or name, parameters=named or None, manufacturer=MANUFACTURER
    )


def _algorithm(name: str, version: str, sha256: str | None) -> AlgorithmIdentification:
    return AlgorithmIdentification(
        name=plain(name),
        version=version,
        parameters=[f"sha256={sha256}"] if sha256 else None,
        family=codes.ARTIFICIAL_INTELLIGENCE,
        manufacturer=MANUFACTURER,
    )

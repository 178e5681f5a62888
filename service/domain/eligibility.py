"""Is this series fit to be measured? One small rule per question, from header facts to a reason or nothing.

Every rule that can be evaluated is evaluated, so that a person sees *all* that is wrong with a series at
once. Objects that are no CT images (reports, segmentations, MR) get only the rules that ask what they are: asking a
report for its tube voltage would say nothing. An enhanced CT is judged frame by frame, as the series of slices that it
holds. Nothing is imputed: an absent value is a refusal where the rule needs it. No header, however broken, makes a rule
raise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from service.domain.completeness import (
    CT_IMAGE_STORAGE,
    Gap,
    Stack,
    angle_deg,
    has_geometry,
    stack_of,
)
from service.domain.facts import InstanceFacts
from service.domain.figures import figure_beside
from service.domain.policy import EligibilityPolicy, Policy, kernel_rank
from service.domain.reasons import Code, Reason

ENHANCED_CT = {
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}

_MONOENERGETIC_WORD = re.compile(r"^(mono|vmi|vmc)", re.IGNORECASE)  # MONO_70, MONOENERGETIC, VMI
_KILOELECTRONVOLT = re.compile(r"\d+\s*kev", re.IGNORECASE)
_SIEMENS_SUFFIX = re.compile(r"(?<=\d)[fds]$", re.IGNORECASE)  # Br38f: the letter names the body region or filter
_LONGEST_SHOWN = 48


class Vendor(StrEnum):
    """The makers whose kernels the policy lists; the values are its keys."""

    CANON = "canon"
    SIEMENS = "siemens"
    PHILIPS = "philips"
    GE = "ge"


_VENDOR_WORDS = {  # how the makers write themselves in Manufacturer (0008,0070)
    Vendor.CANON: ("canon", "toshiba"),
    Vendor.SIEMENS: ("siemens",),
    Vendor.PHILIPS: ("philips",),
    Vendor.GE: ("ge", "general electric"),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a series may be measured: every reason against it, and the cautions that go with a yes."""

    eligible: bool
    reasons: tuple[Reason, ...]
    cautions: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class Patients:
    """Whom images name: every patient ID, birth date and sex that they tell."""

    ids: frozenset[str]
    birth_dates: frozenset[str]
    sexes: frozenset[str]  # F and M alone: "O" contradicts neither

    @property
    def contradictions(self) -> tuple[str, ...]:
        """What more than one patient would explain; figures alone, for the reason is read by many."""
        told = (("patient IDs", self.ids), ("birth dates", self.birth_dates), ("sexes", self.sexes))
        return tuple(f"{len(known)} {name}" for name, known in told if len(known) > 1)


def patients_of(instances: Iterable[InstanceFacts]) -> Patients:
    """Whom the CT images among these name; what others put beside a CT (a capture, an outline) costs it nothing."""
    named = [facts for facts in instances if facts.modality == "CT" and not facts.own_output]
    ids = {(facts.patient_id or "").strip() for facts in named} - {""}
    days = {(facts.patient_birth_date or "").strip() for facts in named} - {""}
    return Patients(frozenset(ids), frozenset(days), frozenset({"F", "M"} & {facts.patient_sex for facts in named}))


@dataclass(frozen=True, slots=True)
class Series:
    """One series as the rules see it: its images in an order of their own, and their stack."""

    objects: tuple[InstanceFacts, ...]  # as they arrived
    instances: tuple[InstanceFacts, ...]  # one an image: an enhanced CT's frames stand for themselves
    stack: Stack | None  # None where there is none to judge
    conflicts: int  # instances that arrived again with other bytes
    patients: Patients  # whom it and the rest of its study name

    @classmethod
    def of(
        cls,
        instances: Sequence[InstanceFacts],
        policy: EligibilityPolicy,
        conflicts: int = 0,
        patients: Patients | None = None,
    ) -> Series:
        """Sort by UID, so that the order of arrival cannot matter, and lay out the stack.

        Without `patients`, the series is all that there is of its study.
        """
        named = patients_of(instances) if patients is None else patients
        ordered = tuple(sorted(instances, key=lambda facts: (facts.sop_instance_uid, repr(facts))))
        images = tuple(image for facts in ordered for image in facts.per_frame())
        return cls(ordered, images, stack_of(images, policy), conflicts, named)

    @property
    def enhanced(self) -> tuple[InstanceFacts, ...]:
        """Its enhanced CT objects."""
        return tuple(facts for facts in self.objects if facts.sop_class_uid in ENHANCED_CT)

    def count(self, wanted: Callable[[InstanceFacts], bool]) -> int:
        """How many instances are as wanted."""
        return sum(1 for facts in self.instances if wanted(facts))

    def share(self, number: int) -> str:
        """ "all 120 images", "3 of 120 images"."""
        total = len(self.instances)
        if number == total:
            return "the only image" if total == 1 else f"all {total} images"
        return f"{number} of {total} images"


Rule = Callable[[Series, EligibilityPolicy], Reason | None]


# What is this object?


def modality(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Modality (0008,0060) is CT."""
    others = {facts.modality for facts in series.instances if facts.modality != "CT"}
    if not others:
        return None
    return Reason(Code.NOT_CT, f"Modality {_listed(others)}; CT is required.")


def sop_class(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """SOP class is CT Image Storage or one of the two enhanced CTs."""
    known = {CT_IMAGE_STORAGE, *ENHANCED_CT}
    others = {facts.sop_class_uid for facts in series.instances if facts.sop_class_uid not in known}
    if not others:
        return None
    return Reason(
        Code.SOP_CLASS_UNSUPPORTED,
        f"SOP class {_listed(others)}; CT Image Storage ({CT_IMAGE_STORAGE}) is required.",
    )


def single_volume(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Plain slices, or one enhanced object that holds all of them."""
    several = max((facts.frames for facts in series.objects if facts.sop_class_uid == CT_IMAGE_STORAGE), default=1)
    if several > 1:
        return Reason(
            Code.MULTIFRAME_UNSUPPORTED,
            f"{several} frames in one object of CT Image Storage; that class holds one slice per object.",
        )
    if not series.enhanced or len(series.objects) == 1 or _is_concatenated(series):
        return None
    kinds = f"{len(series.enhanced)} enhanced CT {'object' if len(series.enhanced) == 1 else 'objects'}"
    others = len(series.objects) - len(series.enhanced)
    mixed = f" and {others} other {'object' if others == 1 else 'objects'}" if others else ""
    return Reason(
        Code.MULTIFRAME_UNSUPPORTED, f"{kinds}{mixed} in one series; one that holds the whole CT is required."
    )


def concatenation(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No object is a part of a larger one that was cut for sending (PS3.3 C.7.6.16.2.2.4)."""
    parts = sum(1 for facts in series.objects if facts.concatenation_uid is not None)
    if not parts:
        return None
    noun = "object is a part" if parts == 1 else "objects are parts"
    return Reason(
        Code.CONCATENATION, f"{parts} {noun} of a concatenation; have the sender's system send the CT as one object."
    )


def pixels(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Every object carries pixels."""
    without = series.count(lambda facts: not facts.has_pixels)
    if not without:
        return None
    return Reason(Code.NO_PIXELS, f"No pixel data in {series.share(without)}.")


# What do its images show?


def localizer(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """ImageType (0008,0008) value 3 is not LOCALIZER: a scout is a projection, not a slice."""
    scouts = series.count(lambda facts: "LOCALIZER" in _words(facts.image_type))
    return Reason(Code.LOCALIZER, f"Localizer: {series.share(scouts)}.") if scouts else None


def original(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """ImageType begins ORIGINAL, PRIMARY: no reformat, no subtraction, no screen copied into a series."""
    others = {_shown("\\".join(facts.image_type)) for facts in series.instances if not _is_original(facts)}
    if not others:
        return None
    return Reason(Code.DERIVED, f"Image type {_listed(others)}; ORIGINAL\\PRIMARY is required.")


def polyenergetic(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No virtual monoenergetic or other multi-energy image: its HU do not belong to 120 kVp."""
    signs = {sign for facts in series.instances for sign in _multienergy_signs(facts)}
    if not signs:
        return None
    return Reason(
        Code.MONOENERGETIC,
        f"Monoenergetic or multi-energy image ({_listed(signs)}); a plain 120 kVp image is required.",
    )


def tube_voltage(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """KVP (0018,0060) is 120: L1 reads some 10 HU less at 140 kVp, and nothing is corrected here."""
    required = f"{policy.kvp_required:g} kVp is required."
    missing = series.count(lambda facts: not _is_number(facts.kvp))
    if missing:
        return Reason(Code.KVP_MISSING, f"Tube voltage missing in {series.share(missing)}; {required}")
    voltages = sorted({facts.kvp for facts in series.instances if facts.kvp is not None})
    if all(abs(kvp - policy.kvp_required) <= policy.kvp_tolerance for kvp in voltages):
        return None
    return Reason(Code.KVP_NOT_120, f"{', '.join(f'{kvp:g}' for kvp in voltages)} kVp; {required}")


def contrast(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No tag speaks of contrast medium; an empty tag, a zero volume and a written "NONE" do not."""
    denials = {denial.casefold() for denial in policy.contrast_denials}
    signs = {tag for facts in series.instances for tag in facts.contrast_bolus if _is_contrast(tag, denials)}
    if not signs:
        return None
    return Reason(Code.CONTRAST_TAGGED, f"Contrast medium by tag ({_listed(signs)}); a native CT is required.")


def age(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """The patient is at least 20 years old; an unknown age is refused, never imputed."""
    minimum = f"{policy.age_minimum_years:g} years or more is required."
    ages = [facts.patient_age_years for facts in series.instances if _is_number(facts.patient_age_years)]
    youngest = min((years for years in ages if years is not None), default=None)
    if youngest is None:
        return Reason(Code.AGE_UNKNOWN, f"Age at the examination unknown; {minimum}")
    if youngest < policy.age_minimum_years:
        return Reason(Code.AGE_BELOW_MINIMUM, f"Age {youngest:.4g} years; {minimum}")
    return None


def thickness(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Slices, and the steps between them, are not thicker than the limit."""
    thickest = _thickest(series)
    if thickest is None:
        return Reason(
            Code.THICKNESS_UNKNOWN,
            f"Slice thickness missing; at most {policy.slice_limit_mm:g} mm is required.",
        )
    step = series.stack.spacing_mm if series.stack else None
    if _exceeds(thickest, policy.slice_limit_mm):
        return Reason(
            Code.SLICES_TOO_THICK,
            f"Slices {thickest:.4g} mm thick; at most {policy.slice_limit_mm:g} mm is accepted.",
        )
    if step is not None and _exceeds(step, policy.slice_limit_mm):
        return Reason(
            Code.SLICES_TOO_THICK,
            f"Slices {step:.4g} mm apart; at most {policy.slice_limit_mm:g} mm is accepted.",
        )
    return None


def vendor(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """The scanner's maker is one whose kernels the policy knows."""
    unknown = {facts.manufacturer for facts in series.instances if vendor_of(facts.manufacturer) is None}
    if not unknown:
        return None
    return Reason(
        Code.VENDOR_UNKNOWN,
        f"Manufacturer {_listed(unknown)}; kernels are known for {', '.join(v.value for v in Vendor)}.",
    )


def kernel(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """ConvolutionKernel (0018,1210) is a soft-tissue one on the vendor's allow-list."""
    if any(first_kernel(facts) is None for facts in series.instances):
        return Reason(Code.KERNEL_UNKNOWN, "Reconstruction kernel missing; a listed soft-tissue kernel is required.")
    refused = [
        (first_kernel(facts), vendor_of(facts.manufacturer))
        for facts in series.instances
        if vendor_of(facts.manufacturer) is not None and _kernel_rank(facts, policy) is None
    ]
    if not refused:
        return None
    names, makers = {name for name, _ in refused}, sorted({maker for _, maker in refused if maker})
    allowed = (f"{maker.value}: {', '.join(getattr(policy.kernels, maker.value))}" for maker in makers)
    return Reason(
        Code.KERNEL_NOT_ALLOWED,
        f"Kernel {_listed(names)}; allowed for {'; '.join(allowed)}.",
    )


def lossless(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No lossy compression, now or ever: it moves HU (JPEG by steps of 32 in a real sample)."""
    lossy = series.count(lambda facts: facts.lossy)
    return Reason(Code.LOSSY, f"Lossy compression in {series.share(lossy)}.") if lossy else None


def rescale(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """RescaleSlope and RescaleIntercept are there: without them stored values are not HU."""
    without = series.count(
        lambda facts: (
            not (_is_number(facts.rescale_slope) and _is_number(facts.rescale_intercept)) or facts.rescale_slope == 0
        )
    )
    if not without:
        return None
    return Reason(Code.NO_RESCALE, f"No usable rescale slope and intercept in {series.share(without)}.")


def hounsfield(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Rescaled values are Hounsfield units (RescaleType absent, HU or unspecified) of one grey channel."""
    units = {facts.rescale_type for facts in series.instances if not _is_hounsfield(facts.rescale_type)}
    if units:
        return Reason(Code.NOT_HU, f"Rescale type {_listed(units)}; HU is required.")
    coloured = series.count(lambda facts: facts.samples_per_pixel not in (None, 1))
    if coloured:
        return Reason(Code.NOT_HU, f"Colour pixels in {series.share(coloured)}; one grey channel in HU is required.")
    return None


# Where do its slices lie?


def geometry(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Position, orientation, pixel spacing and matrix are present in every image."""
    without = series.count(lambda facts: not has_geometry(facts))
    if not without:
        return None
    return Reason(
        Code.NO_GEOMETRY,
        f"Position, orientation, pixel spacing or matrix missing in {series.share(without)}.",
    )


def uniform_geometry(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """One matrix, one orientation, one pixel spacing and one frame of reference in the whole series."""
    placed = [facts for facts in series.instances if has_geometry(facts)]
    differing = [name for name, differs in _differences(placed, policy) if differs]
    if not differing:
        return None
    return Reason(
        Code.MIXED_GEOMETRY, f"Images differ in {', '.join(differing)}; one geometry in a series is required."
    )


def axial(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Slices are transverse: rows along left-right, normal along head-feet, either way round."""
    cosines = [facts for facts in series.instances if has_geometry(facts)]
    worst = max((_off_axial_deg(facts) for facts in cosines), default=0.0)
    if worst <= policy.axial_limit_deg:
        return None
    if max(_off_normal_deg(facts) for facts in cosines) <= policy.axial_limit_deg:
        told = "The patient lies on the side (rows run front to back); supine or prone is required."
        return Reason(Code.NOT_AXIAL, told)
    told = figure_beside(worst, (policy.axial_limit_deg,), 1)
    limit = f"at most {policy.axial_limit_deg:g} deg is accepted."
    return Reason(Code.NOT_AXIAL, f"Slices {told} deg off axial; {limit}")


def tilt(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """The gantry was upright: by its tag and, should that be wrong, by the way the slices are stacked."""
    given = [facts.gantry_tilt_deg for facts in series.instances if facts.gantry_tilt_deg is not None]
    tagged = max((abs(tilt_deg) for tilt_deg in given if math.isfinite(tilt_deg)), default=0.0)
    limit = f"at most {policy.tilt_limit_deg:g} deg is accepted."
    if tagged > policy.tilt_limit_deg:
        told = figure_beside(tagged, (policy.tilt_limit_deg,), 1)
        return Reason(Code.GANTRY_TILT, f"Gantry tilt {told} deg; {limit}")
    if series.stack is not None and series.stack.shear_deg > policy.tilt_limit_deg:
        told = figure_beside(series.stack.shear_deg, (policy.tilt_limit_deg,), 1)
        return Reason(Code.GANTRY_TILT, f"Slices are stacked {told} deg off their normal; {limit}")
    return None


def distinct_positions(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No two slices at one place: two phases or two acquisitions would be mixed."""
    if series.stack is None or not series.stack.duplicates:
        return None
    number, place = len(series.stack.duplicates), series.stack.duplicates[0].below_mm
    acquisitions = {facts.acquisition_number for facts in series.instances}
    mixed = f"; acquisitions {_listed(acquisitions)} share the series" if len(acquisitions) > 1 else ""
    return Reason(Code.DUPLICATE_POSITION, f"{number} slices lie where another does, first at {place:.1f} mm{mixed}.")


def no_missing_slice(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No gap of about a whole multiple of the spacing."""
    stack = series.stack
    if stack is None or not stack.missing:
        return None
    lost = sum(stack.slices_missing_in(gap) for gap in stack.missing)
    noun = "slice" if lost == 1 else "slices"
    return Reason(
        Code.MISSING_SLICE,
        f"{lost} {noun} missing: {_places(stack.missing)} (spacing {stack.spacing_mm:.4g} mm).",
    )


def even_spacing(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Slices are evenly spaced, by their positions along the normal."""
    stack = series.stack
    if stack is None or not stack.uneven:
        return None
    sizes = [gap.size_mm for gap in stack.uneven]
    return Reason(
        Code.SPACING_UNEVEN,
        f"Uneven spacing: {min(sizes):.4g} to {max(sizes):.4g} mm instead of {stack.spacing_mm:.4g} mm "
        f"({_places(stack.uneven)}); {policy.spacing_tolerance_mm:g} mm is tolerated.",
    )


def coverage(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Long enough to hold L1 to L4; whether it does, only the segmentation can tell."""
    if series.stack is None or series.stack.extent_mm >= policy.coverage_minimum_mm:
        return None
    told = figure_beside(series.stack.extent_mm, (policy.coverage_minimum_mm,), 0)
    return Reason(Code.COVERAGE_TOO_SHORT, f"{told} mm covered; {policy.coverage_minimum_mm:g} mm is required.")


def slice_limit(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Not more slices than the worker's memory is meant for."""
    # An object whose frames were too many to be read one by one stands as a single image.
    slices = max(len(series.instances), *(facts.frames for facts in series.objects))
    if slices <= policy.slices_maximum:
        return None
    return Reason(Code.TOO_MANY_SLICES, f"{slices} slices; at most {policy.slices_maximum} are accepted.")


def unambiguous(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """No instance arrived a second time with other bytes."""
    if series.conflicts <= 0:
        return None
    noun = "image" if series.conflicts == 1 else "images"
    return Reason(Code.CONFLICTING_COPIES, f"{series.conflicts} {noun} arrived again with other content.")


def one_patient(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """The CT images of the whole study name one patient: a bone must never be told under another's name."""
    told = series.patients.contradictions
    if not told:
        return None
    return Reason(Code.PATIENT_MISMATCH, f"The CT images of this study name different patients ({', '.join(told)}).")


OBJECT_RULES: tuple[Rule, ...] = (modality, sop_class, concatenation, single_volume, pixels, unambiguous, one_patient)
CT_RULES: tuple[Rule, ...] = (
    localizer,
    original,
    polyenergetic,
    tube_voltage,
    contrast,
    age,
    thickness,
    vendor,
    kernel,
    lossless,
    rescale,
    hounsfield,
    geometry,
    uniform_geometry,
    axial,
    tilt,
    distinct_positions,
    no_missing_slice,
    even_spacing,
    coverage,
    slice_limit,
)


# Cautions: the series is accepted, and this should be known


def thick_slices(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Thicker than the paper's slices, yet accepted."""
    thickest = _thickest(series)
    if thickest is None or not _exceeds(thickest, policy.slice_best_mm):
        return None
    return Reason(
        Code.SLICES_THICK,
        f"Slices {thickest:.4g} mm thick; the method was studied up to {policy.slice_best_mm:g} mm.",
    )


def one_rescale(series: Series, policy: EligibilityPolicy) -> Reason | None:
    """Slope and intercept may differ by slice, and each is used; a converter that broke them shows here."""
    pairs = {(facts.rescale_slope, facts.rescale_intercept) for facts in series.instances}
    if len(pairs) < 2:
        return None
    return Reason(Code.RESCALE_DIFFERS, f"{len(pairs)} different rescale slopes or intercepts; each slice has its own.")


CAUTIONS: tuple[Rule, ...] = (thick_slices, one_rescale)


# The verdict

OWN_OUTPUT = Reason(Code.OWN_OUTPUT, "Made by Osteogate itself and sent back: kept, and otherwise ignored.")


def assess_series(
    instances: Sequence[InstanceFacts], policy: Policy, *, conflicts: int = 0, patients: Patients | None = None
) -> Verdict:
    """Judge one series by its headers: every rule that can be evaluated, every reason that it gives.

    `patients` are those whom its whole study names; None: it is all of its study.
    """
    if not instances:
        return Verdict(False, (Reason(Code.UNREADABLE, "The series holds no readable image."),))
    if all(facts.own_output for facts in instances):
        return Verdict(False, (OWN_OUTPUT,))
    rules = policy.eligibility
    series = Series.of(instances, rules, conflicts, patients)
    reasons = _reasons(OBJECT_RULES, series, rules)
    if not _is_ct_volume(series, rules):
        return Verdict(False, reasons)
    reasons += _reasons(CT_RULES, series, rules)
    return Verdict(not reasons, reasons, () if reasons else _reasons(CAUTIONS, series, rules))


def _reasons(rules: tuple[Rule, ...], series: Series, policy: EligibilityPolicy) -> tuple[Reason, ...]:
    return tuple(reason for reason in (rule(series, policy) for rule in rules) if reason is not None)


def _is_ct_volume(series: Series, policy: EligibilityPolicy) -> bool:
    """Whether the series is one set of CT images: only then do the questions about a CT make sense."""
    return not any(rule(series, policy) for rule in (sop_class, concatenation, single_volume))


def _is_concatenated(series: Series) -> bool:
    return any(facts.concatenation_uid is not None for facts in series.objects)


# The choice


@dataclass(frozen=True, slots=True)
class Choice:
    """Which series of a study is measured (None: none is), why, and the reason beside each eligible one."""

    series_uid: str | None
    text: str
    reasons: Mapping[str, Reason]  # by series UID: CHOSEN, NOT_CHOSEN

    @property
    def reason(self) -> Reason:
        """The study's own reason: CHOSEN or NO_ELIGIBLE_SERIES."""
        return Reason(Code.CHOSEN if self.series_uid else Code.NO_ELIGIBLE_SERIES, self.text)


@dataclass(frozen=True, slots=True, order=True)
class _Rank:
    """What makes one eligible series better than another; compared field by field, the smaller wins."""

    off_paper_mm: float
    kernel_rank: int
    shortfall_mm: float  # minus the coverage
    number: float
    uid: str

    def why(self, best: _Rank) -> str:
        """The first field in which the best series is better."""
        if self.off_paper_mm > best.off_paper_mm:
            return "its slices are further from the paper's"
        if self.kernel_rank > best.kernel_rank:
            return "its kernel comes later on the allow-list"
        if self.shortfall_mm > best.shortfall_mm:
            return "it covers less"
        return "it is as good, with a higher series number or UID"


def choose(series: Mapping[str, tuple[Sequence[InstanceFacts], Verdict]], policy: Policy) -> Choice:
    """The best eligible series: slices nearest the paper's, then kernel, coverage, series number, UID."""
    found = {uid: Series.of(instances, policy.eligibility) for uid, (instances, _) in series.items()}
    ranks = {uid: _rank(uid, found[uid], policy.eligibility) for uid in found if series[uid][1].eligible}
    names = {uid: _name(uid, one) for uid, one in found.items()}
    refused = [
        f"{names[uid]} is not eligible ({', '.join(reason.code for reason in series[uid][1].reasons)})"
        for uid in sorted(series, key=lambda uid: (_number(found[uid]), uid))
        if uid not in ranks
    ]
    if not ranks:
        return Choice(None, _sentence("No series is eligible", refused), {})
    best = min(ranks, key=ranks.__getitem__)
    beaten = {uid: ranks[uid].why(ranks[best]) for uid in sorted(ranks, key=ranks.__getitem__) if uid != best}
    chosen = f"{_capital(names[best])} was chosen ({_described(found[best])})"
    text = _sentence(chosen, [*(f"{names[uid]} was not: {why}" for uid, why in beaten.items()), *refused])
    losers = {
        uid: Reason(Code.NOT_CHOSEN, f"Eligible, but {why}; {names[best]} was chosen.") for uid, why in beaten.items()
    }
    return Choice(best, text, {best: Reason(Code.CHOSEN, f"{chosen}."), **losers})


def _rank(uid: str, series: Series, policy: EligibilityPolicy) -> _Rank:
    thick = _thickest(series)
    off_paper = (
        math.inf if thick is None else max(0.0, thick - policy.slice_best_mm, policy.slice_paper_thinnest_mm - thick)
    )
    ranks = [_kernel_rank(facts, policy) for facts in series.instances]
    return _Rank(
        off_paper_mm=round(off_paper, 3),
        kernel_rank=max((1000 if rank is None else rank for rank in ranks), default=1000),
        shortfall_mm=-round(series.stack.extent_mm, 1) if series.stack else 0.0,
        number=_number(series),
        uid=uid,
    )


def _number(series: Series) -> float:
    """The series number, lowest where several are given; infinite where none is."""
    return min(
        (facts.series_number for facts in series.instances if facts.series_number is not None),
        default=math.inf,
    )


def _name(uid: str, series: Series) -> str:
    number = _number(series)
    return f"series {number:.0f}" if math.isfinite(number) else f"the series ...{uid[-8:]}"


def _described(series: Series) -> str:
    """ "1 mm slices, kernel Br40, 240 mm"."""
    thick, kernels = _thickest(series), {first_kernel(facts) for facts in series.instances}
    extent = f"{series.stack.extent_mm:.0f} mm long" if series.stack else "length unknown"
    return f"{thick or 0:.4g} mm slices, kernel {_listed(kernels)}, {extent}"


def _sentence(head: str, parts: Sequence[str]) -> str:
    return f"{head}{'; ' if parts else ''}{'; '.join(parts)}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# Reading single values


def vendor_of(manufacturer: str | None) -> Vendor | None:
    """The maker behind Manufacturer (0008,0070): "TOSHIBA", "CANON_MEC", "GE MEDICAL SYSTEMS"."""
    words = re.sub(r"[^a-z]+", " ", (manufacturer or "").casefold()).split()
    joined = f" {' '.join(words)} "
    for maker, names in _VENDOR_WORDS.items():
        if any(f" {name} " in joined for name in names):
            return maker
    return None


def first_kernel(facts: InstanceFacts) -> str | None:
    """The first value of ConvolutionKernel: ["Br38f", "3"] is Br38f with iterative strength 3."""
    first = facts.convolution_kernel[0] if facts.convolution_kernel else None
    return str(first).strip() or None if first is not None else None


def _kernel_rank(facts: InstanceFacts, policy: EligibilityPolicy) -> int | None:
    maker, name = vendor_of(facts.manufacturer), first_kernel(facts)
    if maker is None or name is None:
        return None
    if maker is Vendor.SIEMENS:
        name = _SIEMENS_SUFFIX.sub("", name)
    return kernel_rank(name, getattr(policy.kernels, maker.value))


def _is_original(facts: InstanceFacts) -> bool:
    values = [str(value).strip().upper() for value in facts.image_type[:2]]
    return values == ["ORIGINAL", "PRIMARY"]


def _multienergy_signs(facts: InstanceFacts) -> list[str]:
    signs = [word for word in _words(facts.image_type) if _MONOENERGETIC_WORD.match(word)]
    if facts.multienergy:
        signs.append("MultienergyCTAcquisition")
    described = _KILOELECTRONVOLT.search(facts.series_description or "")
    return signs + ([described[0]] if described else [])


def _words(values: Iterable[str]) -> list[str]:
    """Every word in a multi-valued tag: "CT_SOM5 MONO_70" gives CT, SOM5, MONO, 70."""
    return [word.upper() for value in values for word in re.split(r"[^A-Za-z0-9]+", str(value)) if word]


def _is_contrast(tag: str, denials: set[str]) -> bool:
    """True where one "Keyword=value" says that contrast medium was given."""
    _, equals, after = tag.partition("=")
    value = (after if equals else tag).strip().casefold()
    if not value or value in denials:
        return False
    try:
        return float(value) != 0
    except ValueError:
        return True


def _is_hounsfield(rescale_type: str | None) -> bool:
    return (rescale_type or "").strip().upper() in ("", "HU", "US")


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _thickest(series: Series) -> float | None:
    """The thickest slice in mm; None where any image does not give a thickness."""
    given = [facts.slice_thickness_mm for facts in series.instances]
    usable = [value for value in given if value is not None and math.isfinite(value) and value > 0]
    return max(usable) if usable and len(usable) == len(given) else None


def _exceeds(value_mm: float, limit_mm: float) -> bool:
    return value_mm > limit_mm + 0.005  # positions and tags are written with two decimals


def _differences(placed: Sequence[InstanceFacts], policy: EligibilityPolicy) -> list[tuple[str, bool]]:
    """What could differ between the images of one series, and whether it does."""
    if not placed:
        return []
    # The smallest in place of the first: the answer must not depend on the order of arrival.
    row, column = min(
        (facts.row_cosine, facts.column_cosine) for facts in placed if facts.row_cosine and facts.column_cosine
    )
    steps = [facts.pixel_spacing_mm for facts in placed if facts.pixel_spacing_mm is not None]
    spread = max(max(step[axis] for step in steps) - min(step[axis] for step in steps) for axis in (0, 1))
    turned = max(
        max(angle_deg(row, facts.row_cosine), angle_deg(column, facts.column_cosine))
        for facts in placed
        if facts.row_cosine and facts.column_cosine
    )
    return [
        ("matrix", len({(facts.rows, facts.columns) for facts in placed}) > 1),
        ("orientation", turned > policy.orientation_tolerance_deg),
        ("pixel spacing", spread > policy.pixel_spacing_tolerance_mm),
        ("frame of reference", len({facts.frame_of_reference_uid for facts in placed}) > 1),
    ]


def _off_axial_deg(facts: InstanceFacts) -> float:
    """How far rows lean from the left-right axis or columns from front-back, whichever is worse.

    With both in place the normal is along head-feet. Signs are free: prone and feet-first lie the other way.
    """
    row, column = facts.row_cosine, facts.column_cosine
    if row is None or column is None:
        return 90.0
    leans = (abs(row[0]), abs(column[1]))
    return max(math.degrees(math.acos(min(1.0, lean))) for lean in leans)


def _off_normal_deg(facts: InstanceFacts) -> float:
    """How far the slices' normal leans from the head-feet axis, however the rows run."""
    row, column = facts.row_cosine, facts.column_cosine
    if row is None or column is None:
        return 90.0
    along = abs(row[0] * column[1] - row[1] * column[0])
    return math.degrees(math.acos(min(1.0, along)))


# Words for people


def _shown(value: object) -> str:
    """A header's value, fit to stand in a sentence: printable and short."""
    text = "".join(mark if mark.isprintable() else " " for mark in str(value)).strip()
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _listed(values: Iterable[object]) -> str:
    shown = sorted({_shown(value) if value not in (None, "") else "missing" for value in values})
    rest = len(shown) - 3
    return ", ".join(shown[:3]) + (f" and {rest} more" if rest > 0 else "")


def _places(gaps: Sequence[Gap]) -> str:
    shown = ", ".join(str(gap) for gap in gaps[:3])
    return shown + (f" and {len(gaps) - 3} more" if len(gaps) > 3 else "")

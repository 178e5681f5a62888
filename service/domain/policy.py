"""Every threshold of the pathway: one frozen, versioned policy, each number with its unit and its source.

A site changes numbers in a TOML file (`OSTEOGATE_POLICY_FILE`, read by `load_policy`), never in code. A
changed policy says so in its label, which stands in every result: two results with one label were judged by
the same numbers.

Sources marked [S] were read in the publication; [K] marks general knowledge that nobody here has verified:
the site should, before it relies on it.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

from service.domain.bone import DENSITOMETERS, REGION, Reference, References, load_references, misfits
from service.domain.criteria import PROFILES, YOSHIDA, YOSHIDA_2023, CriteriaProfile, definitions
from service.domain.dxa import manufacturer_named
from service.domain.errors import PolicyError

UNVERIFIED = "[K] unverified"
PICKHARDT = "Pickhardt; Jang 2019 norms [S/K]: for the site to verify"

KERNEL_PATTERN = re.compile(r"(?P<low>[A-Za-z]+[0-9]+)-(?P<high>[A-Za-z]+[0-9]+)|[A-Za-z0-9_+ ]+")
_LETTERS_AND_NUMBER = re.compile(r"([a-z]+)([0-9]+)")


_NOT_IN_THE_FILE = {"source": "worked out from the file"}


def _threshold(
    default: Any,
    *,
    unit: str,
    source: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """One entry of the policy: its default, its unit, who says so, and what it may be set to."""
    return field(
        default=default,
        metadata={"unit": unit, "source": source, "low": low, "high": high, "choices": choices},
    )


@dataclass(frozen=True, slots=True)
class KernelPolicy:
    """Soft-tissue kernels per vendor, the preferred one first; "Br36-Br44" is a range of numbers."""

    canon: tuple[str, ...] = _threshold(
        ("FC03", "FC18", "FC13"),
        unit="kernel",
        source=f"FC03, FC18: {YOSHIDA}; FC13: {UNVERIFIED}",
    )
    siemens: tuple[str, ...] = _threshold(
        ("Br40", "Br36-Br44", "B30-B40", "Qr30-Qr49"),
        unit="kernel",
        source=f"Br40: {YOSHIDA}; the ranges: {UNVERIFIED}",
    )
    philips: tuple[str, ...] = _threshold(
        ("B", "C", "A"),
        unit="kernel",
        source=f"B, C: {YOSHIDA}; A: {UNVERIFIED}",
    )
    ge: tuple[str, ...] = _threshold(
        ("STANDARD", "SOFT"),
        unit="kernel",
        source=f"{UNVERIFIED}; GE was not among the paper's scanners",
    )


@dataclass(frozen=True, slots=True)
class EligibilityPolicy:
    """What a CT series must be like before anything is measured on it."""

    kernels: KernelPolicy = KernelPolicy()
    kvp_required: float = _threshold(120.0, unit="kVp", source=YOSHIDA, low=70, high=150)
    kvp_tolerance: float = _threshold(
        0.5, unit="kVp", source=f"{UNVERIFIED}; rounding in the tag, not another tube voltage", low=0, high=2
    )
    age_minimum_years: float = _threshold(20.0, unit="years", source=YOSHIDA, low=18, high=120)
    slice_paper_thinnest_mm: float = _threshold(0.5, unit="mm", source=YOSHIDA, low=0.1, high=5)
    slice_best_mm: float = _threshold(1.0, unit="mm", source=YOSHIDA, low=0.1, high=5)
    slice_limit_mm: float = _threshold(
        3.0,
        unit="mm",
        source=f"{UNVERIFIED}; beyond the paper's 1.0 mm: a body of 27 mm still has nine slices",
        low=0.1,
        high=5,
    )
    tilt_limit_deg: float = _threshold(
        0.5, unit="deg", source=f"{UNVERIFIED}; half a degree shears a spine of 200 mm by 2 mm", low=0, high=5
    )
    axial_limit_deg: float = _threshold(
        5.0, unit="deg", source=f"{UNVERIFIED}; a rotated table, not a reformat", low=0, high=30
    )
    spacing_tolerance_mm: float = _threshold(
        0.15, unit="mm", source=f"{UNVERIFIED}; positions rounded to 0.1 mm pass", low=0.001, high=1
    )
    missing_slice_tolerance: float = _threshold(
        0.15,
        unit="slice spacings",
        source=f"{UNVERIFIED}; how near to a whole multiple a gap means lost slices",
        low=0.01,
        high=0.49,
    )
    duplicate_distance_mm: float = _threshold(
        0.01, unit="mm", source=f"{UNVERIFIED}; nearer slices are at one position", low=0.0001, high=0.1
    )
    coverage_minimum_mm: float = _threshold(
        120.0,
        unit="mm",
        source=f"{UNVERIFIED}; four lumbar bodies and three discs of a small adult",
        low=50,
        high=500,
    )
    slices_maximum: int = _threshold(
        2000,
        unit="slices",
        source=f"{UNVERIFIED}; worker memory: 2000 x 512 x 512 float32 is 2.1 GB",
        low=10,
        high=20000,
    )
    orientation_tolerance_deg: float = _threshold(
        0.1,
        unit="deg",
        source=f"{UNVERIFIED}; rounding in the tag, not another orientation",
        low=0.001,
        high=1,
    )
    pixel_spacing_tolerance_mm: float = _threshold(
        0.001, unit="mm", source=f"{UNVERIFIED}; rounding in the tag, not another grid", low=0.00001, high=0.1
    )
    contrast_denials: tuple[str, ...] = _threshold(
        ("NO", "N", "NONE", "NOT APPLIED", "NO CONTRAST", "NON CONTRAST", "NATIVE", "WITHOUT"),
        unit="tag value",
        source=f"{UNVERIFIED}; what people write in a contrast tag to say that there was none",
    )


@dataclass(frozen=True, slots=True)
class FindingsPolicy:
    """What a vertebra or a CT may show before it is left out; grades of fracture are Genant's own, not here."""

    cobb_noted_deg: float = _threshold(
        10.0, unit="deg", source=f"{UNVERIFIED}; scoliosis by definition", low=1, high=90
    )
    cobb_severe_deg: float = _threshold(
        40.0,
        unit="deg",
        source=f'{UNVERIFIED}; severe. {YOSHIDA} excluded "severe scoliosis" without a number',
        low=10,
        high=120,
    )
    metal_hu: float = _threshold(2000.0, unit="HU", source=f"{UNVERIFIED}; 2000-2500", low=1000, high=3071)
    metal_near_mm: float = _threshold(
        5.0, unit="mm", source="our choice: a rod beside the next screw throws its streaks too", low=0, high=20
    )
    metal_mm3: float = _threshold(
        50.0, unit="mm3", source="our choice: a clip, not a noisy voxel; screws measure 2500 and more", low=1, high=5000
    )
    cement_hu: float = _threshold(
        800.0, unit="HU", source=f"{UNVERIFIED}; 600-1000, and above the hardest bone", low=400, high=2000
    )
    cement_mm3: float = _threshold(
        300.0, unit="mm3", source="our choice, from digital patients: models/SEGMENTATION.md", low=10, high=10_000
    )
    sclerosis_hu: float = _threshold(
        75.0, unit="HU", source="our choice, from digital patients: models/SEGMENTATION.md", low=20, high=1000
    )
    quality_minimum: float = _threshold(
        0.5,
        unit="quality, 0 to 1",
        source="measured, models/SEGMENTATION.md: 0.5 is the limit that the calibration on digital patients found",
        low=0,
        high=1,
    )
    contrast_vessel_hu: float = _threshold(
        100.0, unit="HU", source=f"{UNVERIFIED}; unenhanced blood is 30-60, muscle up to 75", low=50, high=500
    )
    contrast_kidney_hu: float = _threshold(
        100.0, unit="HU", source=f"{UNVERIFIED}; unenhanced kidney is 20-50, liver up to 75", low=50, high=500
    )


@dataclass(frozen=True, slots=True)
class ReferralPolicy:
    """How measured values become a decision."""

    criteria: str = _threshold(
        YOSHIDA_2023.name,
        unit="criteria profile",
        source=f"{YOSHIDA}; the others: service.domain.criteria",
        choices=tuple(PROFILES),
    )
    reference_female: str = _threshold(
        "",
        unit="key of a reference",
        source="the site: the young-adult reference for women that it verified for its own DXA device and population",
    )
    reference_male: str = _threshold("", unit="key of a reference", source="the site: the same for men")
    percent_yam_margin: float = _threshold(
        5.0,
        unit="% YAM",
        source="our choice: the least significant change of a Prodigy, 2.77 x its precision CV of 1.5 % [S], "
        "rounded up",
        low=0,
        high=30,
    )
    tbs_impaired: float = _threshold(1.31, unit="TBS", source=YOSHIDA, low=0.6, high=1.8)
    tbs_effect: str = _threshold(
        "note",
        unit="what an impaired TBS does to a decision of no-flag",
        source=f"our choice: PPV 52 %, AUC 0.77 in {YOSHIDA} are too weak to refer on TBS alone",
        choices=("note", "indeterminate", "refer"),
    )
    hu_refer: float = _threshold(110.0, unit="HU", source=f"L1 at 120 kVp: {PICKHARDT}", low=0, high=300)
    hu_no_flag: float = _threshold(160.0, unit="HU", source=f"L1 at 120 kVp: {PICKHARDT}", low=0, high=300)
    without_l1: str = _threshold(
        "indeterminate",
        unit="decision where L1 cannot be measured",
        source=f"our choice: the published thresholds hold for L1 only ({PICKHARDT})",
        choices=("indeterminate", "not-assessable"),
    )
    levels_minimum: int = _threshold(
        2,
        unit="vertebrae",
        source="ISCD 2023 [S]: never from a single vertebra; TBS >= 2: NHANES [S]",
        low=2,
        high=4,
    )
    bmd_lowest_g_cm2: float = _threshold(0.2, unit="g/cm2", source=f"{UNVERIFIED}; lower is no vertebra", low=0, high=1)
    bmd_highest_g_cm2: float = _threshold(
        2.5, unit="g/cm2", source=f"{UNVERIFIED}; higher is no bone alone", low=1, high=5
    )
    tbs_lowest: float = _threshold(0.6, unit="TBS", source="plausible range 0.6-1.8 [S]", low=0, high=1.8)
    tbs_highest: float = _threshold(1.8, unit="TBS", source="plausible range 0.6-1.8 [S]", low=0.6, high=3)
    hu_lowest: float = _threshold(-150.0, unit="HU", source=f"{UNVERIFIED}; fat marrow", low=-500, high=0)
    hu_highest: float = _threshold(
        600.0, unit="HU", source=f"{UNVERIFIED}; cement starts about there", low=100, high=3000
    )
    network_gate_passed: bool = _threshold(
        False,
        unit="yes or no",
        source="the site: lets the network decide for real patients, and then only a model that was promoted here "
        "after it passed the gate",
    )

    @property
    def profile(self) -> CriteriaProfile:
        """The criteria in force."""
        return PROFILES[self.criteria]


@dataclass(frozen=True, slots=True)
class PairingPolicy:
    """Which DXA result may say what the bone of a CT is."""

    densitometer: str = _threshold(
        "GE Lunar",
        unit="maker of the densitometer",
        source="the site: whose BMD its pairs, its retrained models and its young adults speak; makers read "
        "the same bone differently, by some 10 % [K] unverified",
    )

    window_days: int = _threshold(
        365, unit="days", source=f"{UNVERIFIED}; bone changes by a few per cent in a year", low=1, high=3650
    )


@dataclass(frozen=True, slots=True)
class MonitoringPolicy:
    """When a figure may be told, a scanner be called changed, and a retraining be worth the while."""

    pairs_minimum: int = _threshold(
        20,
        unit="pairs",
        source="our choice: below it an interval says nothing that a person could use",
        low=6,
        high=1000,
    )
    retraining_pairs: int = _threshold(
        300, unit="new pairs", source="our choice: the order of the 350 patients of Yoshida 2023", low=10, high=100_000
    )
    baseline_studies: int = _threshold(
        40,
        unit="studies",
        source="our choice: the mean of 40 errs by a sixth of a standard deviation",
        low=10,
        high=1000,
    )
    ewma_weight: float = _threshold(
        0.2,
        unit="weight of the newest study",
        source="NIST/SEMATECH e-Handbook 6.3.2.4 [K]: 0.2 to 0.3",
        low=0.02,
        high=1,
    )
    ewma_limit_sd: float = _threshold(
        4.5,
        unit="standard deviations of the average",
        source="our choice instead of the usual 3, for three tissues of every scanner are watched: "
        "tests/service/domain/test_drift.py measures what it costs",
        low=2,
        high=10,
    )
    week_studies: int = _threshold(10, unit="studies a week", source="our choice: fewer say nothing", low=5, high=1000)
    flag_chance: float = _threshold(
        0.0027,
        unit="chance a week",
        source="Shewhart's three standard deviations, both sides [K]",
        low=0.00001,
        high=0.1,
    )


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What a retrained or imported model must show on the locked test set before a person may promote it.

    All of it is asked of people's pairs alone: one digital patient in the test set, and the gate is shut.
    """

    version: int = _threshold(1, unit="version of the gate", source="our choice", low=1, high=10_000)
    task: str = _threshold(
        "osteopenia",
        unit="what is detected",
        source=f"our choice: the threshold that refers; {YOSHIDA}",
        choices=("osteopenia", "osteoporosis"),
    )
    patients_minimum: int = _threshold(
        50, unit="patients", source="[K] unverified; 50 tell a mean error to about 0.015 g/cm2", low=20, high=100_000
    )
    positives_minimum: int = _threshold(
        15, unit="patients", source="[K] unverified; 13 of 15 has a lower bound of 0.62", low=5, high=100_000
    )
    sensitivity_lower: float = _threshold(0.6, unit="lower bound (Wilson, 95 %)", source=UNVERIFIED, low=0.3, high=0.99)
    specificity_lower: float = _threshold(0.6, unit="lower bound (Wilson, 95 %)", source=UNVERIFIED, low=0.3, high=0.99)
    inferior_bmd_g_cm2: float = _threshold(
        0.01,
        unit="g/cm2 of mean absolute error",
        source="our choice: below a Prodigy's precision CV of 1.5 % [S] at 1 g/cm2",
        low=0,
        high=0.05,
    )
    inferior_bmd_subgroup_g_cm2: float = _threshold(
        0.02, unit="g/cm2 of mean absolute error", source="our choice: a subgroup is small", low=0, high=0.05
    )
    inferior_tbs: float = _threshold(
        0.02,
        unit="TBS of mean absolute error",
        source="our choice: a Prodigy's precision CV is 1.6 % [S], 0.02 at 1.3",
        low=0,
        high=0.1,
    )
    inferior_tbs_subgroup: float = _threshold(
        0.04, unit="TBS of mean absolute error", source="our choice: a subgroup is small", low=0, high=0.1
    )
    inferior_auc: float = _threshold(0.03, unit="ROC area", source="our choice", low=0, high=0.2)
    subgroup_patients: int = _threshold(
        20, unit="patients of a subgroup that is judged", source="[K] unverified", low=5, high=1000
    )
    slope_lowest: float = _threshold(0.8, unit="g/cm2 DXA per g/cm2 predicted", source=UNVERIFIED, low=0.3, high=1)
    slope_highest: float = _threshold(1.2, unit="g/cm2 DXA per g/cm2 predicted", source=UNVERIFIED, low=1, high=3)
    intercept_g_cm2: float = _threshold(
        0.2,
        unit="g/cm2, either way",
        source=f"{UNVERIFIED}; what a slope of 0.8 or 1.2 makes at 1 g/cm2",
        low=0,
        high=1,
    )
    coverage_shortfall: float = _threshold(
        0.1,
        unit="share of patients below the interval's level",
        source="our choice: 50 patients tell 90 % to about 8 %",
        low=0,
        high=0.5,
    )
    bias_g_cm2: float = _threshold(
        0.02, unit="g/cm2 of mean error on any scanner, either way", source="our choice", low=0.001, high=0.2
    )
    tbs_judged: bool = _threshold(True, unit="yes or no", source="the site: no, where its densitometer gives no TBS")


@dataclass(frozen=True, slots=True)
class TrainingPolicy:
    """When the site's own pairs are enough to train on."""

    patients_minimum: int = _threshold(
        50,
        unit="patients",
        source=f"our choice: far fewer than the 280 of {YOSHIDA}, enough to fine-tune; the gate judges what came of it",
        low=10,
        high=100_000,
    )
    locked_minimum: int = _threshold(
        10, unit="patients", source="our choice: fewer judge nothing; the gate asks for more", low=2, high=100_000
    )
    locked_share: float = _threshold(
        0.2, unit="share of patients", source=f"our choice; {YOSHIDA} tested on 52 of 402", low=0.05, high=0.5
    )


@dataclass(frozen=True, slots=True)
class Policy:
    """The whole rule book of one installation; `label` names it in every result."""

    version: int = _threshold(1, unit="version", source="ours", low=1, high=10_000)
    eligibility: EligibilityPolicy = EligibilityPolicy()
    findings: FindingsPolicy = FindingsPolicy()
    referral: ReferralPolicy = ReferralPolicy()
    pairing: PairingPolicy = PairingPolicy()
    monitoring: MonitoringPolicy = MonitoringPolicy()
    gate: GatePolicy = GatePolicy()
    training: TrainingPolicy = TrainingPolicy()
    references: tuple[Reference, ...] = field(default=(), metadata=_NOT_IN_THE_FILE)  # for real patients, as chosen

    @property
    def label(self) -> str:
        """ "YOSHIDA_2023 v1": the criteria; with a fingerprint behind it where a site changed anything else."""
        plain = f"{self.referral.criteria} v{self.version}"
        as_shipped = Policy(version=self.version, referral=ReferralPolicy(criteria=self.referral.criteria))
        return plain if self == as_shipped else f"{plain}, site {_fingerprint(self)}"

    @property
    def gate_label(self) -> str:
        """ "gate v1": what a verdict was given by; with a fingerprint behind it where a site changed any of it.

        What is detected is defined by the criteria and the young adults in force, so these count as well as the limits.
        """
        plain = f"gate v{self.gate.version}"
        if self.gate == GatePolicy(version=self.gate.version) and not self.young_adults:
            return plain
        counted_by = {
            task: [one["young_adult_bmd"], one["cut_g_cm2"], one["inclusive"]] for task, one in self.definitions.items()
        }
        judged_by = json.dumps([asdict(self.gate), counted_by], sort_keys=True)
        return f"{plain}, site {hashlib.sha256(judged_by.encode()).hexdigest()[:8]}"

    @property
    def young_adults(self) -> dict[str, Reference]:
        """By sex, those of L1 to L4 that the site chose for its patients: what an evaluation on L1 to L4 can use."""
        return {one.sex: one for one in self.references if one.region == REGION}

    @property
    def definitions(self) -> dict[str, dict[str, Any]]:
        """Who among the site's patients counts as having osteopenia and osteoporosis, for an evaluation."""
        return definitions(self.referral.profile, self.young_adults)

    def reference_for(self, sex: str) -> Reference | None:
        """The reference that the site chose for real patients of this sex; None where it chose none."""
        return next((reference for reference in self.references if reference.sex == sex), None)


DEFAULT_POLICY = Policy()


class Threshold(NamedTuple):
    """One line of the policy as people read it."""

    path: str
    value: Any
    unit: str
    source: str


def thresholds(policy: Policy) -> list[Threshold]:
    """Every threshold of a policy, in order, for the pages and the documentation."""
    sections = {
        "eligibility.": policy.eligibility,
        "findings.": policy.findings,
        "referral.": policy.referral,
        "pairing.": policy.pairing,
        "monitoring.": policy.monitoring,
        "gate.": policy.gate,
        "training.": policy.training,
    }
    return [threshold for prefix, section in sections.items() for threshold in _thresholds(section, prefix)]


def _thresholds(section: Any, prefix: str) -> list[Threshold]:
    found: list[Threshold] = []
    for entry in fields(section):
        value = getattr(section, entry.name)
        if is_dataclass(value):
            found += _thresholds(value, f"{prefix}{entry.name}.")
        else:
            unit, source = entry.metadata["unit"], entry.metadata["source"]
            found.append(Threshold(prefix + entry.name, value, unit, source))
    return found


def _fingerprint(policy: Policy) -> str:
    values = {threshold.path: threshold.value for threshold in thresholds(policy)}
    values["references"] = [asdict(reference) for reference in policy.references]
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:8]


# Reading a site's file


def load_policy(toml_text: str, references: References | None = None) -> Policy:
    """The default policy with a site's changes.

    Args:
        toml_text: the site's file.
        references: those that it may choose from; None: the ones that ship with Osteogate.

    Raises:
        PolicyError: it names the first key that cannot be used.
    """
    try:
        given = tomllib.loads(toml_text)
    except tomllib.TOMLDecodeError as error:
        raise PolicyError("", f"not valid TOML: {error}") from None
    policy: Policy = _override(DEFAULT_POLICY, given, "")
    _check_order(policy)
    maker = manufacturer_named(policy.pairing.densitometer)
    policy = replace(policy, pairing=replace(policy.pairing, densitometer=maker))
    device = DENSITOMETERS.get(maker, maker)
    return replace(policy, references=_chosen_references(policy.referral, references or load_references(), device))


def _override(section: Any, given: dict[str, Any], prefix: str) -> Any:
    """A copy of one section with the given entries in place of its own."""
    known = {entry.name: entry for entry in fields(section) if entry.metadata is not _NOT_IN_THE_FILE}
    changes: dict[str, Any] = {}
    for name, value in given.items():
        key = prefix + name
        if name not in known:
            raise PolicyError(key, f"unknown; known here: {', '.join(sorted(known))}")
        current = getattr(section, name)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise PolicyError(key, "must be a table")
            changes[name] = _override(current, value, f"{key}.")
        else:
            changes[name] = _checked(key, value, current, known[name].metadata)
            if isinstance(section, KernelPolicy):
                _check_kernels(key, changes[name])
    return replace(section, **changes)


def _checked(key: str, value: Any, current: Any, limits: Any) -> Any:
    """The value in the type of the one that it replaces, inside its limits."""
    if isinstance(current, bool):
        return _of_type(key, value, bool, "true or false")
    if isinstance(current, int):
        return _within(key, _of_type(key, value, int, "a whole number"), limits)
    if isinstance(current, float):
        number = _of_type(key, value, (int, float), "a number")
        return float(_within(key, number, limits))
    if isinstance(current, str):
        word = _of_type(key, value, str, "a text")
        return word if word == current else _one_of(key, word, limits["choices"])
    words = _of_type(key, value, list, "a list of texts")
    return tuple(_of_type(key, word, str, "a list of texts") for word in words)


def _of_type(key: str, value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    # bool is an int in Python, but `kvp_required = true` is a mistake.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PolicyError(key, f"must be {what}, not {value!r}")
    return value


def _within(key: str, number: float, limits: Any) -> float:
    low, high = limits["low"], limits["high"]
    if not low <= number <= high:  # NaN fails this too
        raise PolicyError(key, f"must lie within {low:g} to {high:g} {limits['unit']}, not {number!r}")
    return number


def _one_of(key: str, word: str, choices: tuple[str, ...]) -> str:
    if choices and word not in choices:
        raise PolicyError(key, f"must be one of {', '.join(choices)}, not {word!r}")
    if not word.strip():
        raise PolicyError(key, "must not be empty")
    return word


def _check_kernels(key: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        found = KERNEL_PATTERN.fullmatch(pattern)
        if found is None:
            raise PolicyError(key, f"{pattern!r} is neither a kernel (Br40) nor a range (Br36-Br44)")
        if found["low"] and _span(pattern) is None:
            raise PolicyError(key, f"{pattern!r} must run upwards within one family of kernels")


def _check_order(policy: Policy) -> None:
    """Thresholds that only make sense in order."""
    eligibility, referral = policy.eligibility, policy.referral
    pairs = [
        (eligibility, "eligibility", "slice_paper_thinnest_mm", "slice_best_mm"),
        (eligibility, "eligibility", "slice_best_mm", "slice_limit_mm"),
        (referral, "referral", "hu_refer", "hu_no_flag"),
        (referral, "referral", "bmd_lowest_g_cm2", "bmd_highest_g_cm2"),
        (referral, "referral", "tbs_lowest", "tbs_highest"),
    ]
    for section, prefix, lower, upper in pairs:
        low, high = getattr(section, lower), getattr(section, upper)
        if low > high:
            raise PolicyError(f"{prefix}.{lower}", f"{low:g} must not be above {upper} ({high:g})")


def _chosen_references(policy: ReferralPolicy, at_hand: References, device: str) -> tuple[Reference, ...]:
    """The references chosen for women and men: one that does not fit is refused at start, not on the first patient."""
    wanted = {"F": ("reference_female", policy.reference_female), "M": ("reference_male", policy.reference_male)}
    return tuple(
        _chosen_reference(f"referral.{name}", key, sex, policy.profile, at_hand, device)
        for sex, (name, key) in wanted.items()
        if key
    )


def _chosen_reference(
    name: str, key: str, sex: str, profile: CriteriaProfile, at_hand: References, device: str
) -> Reference:
    reference = at_hand.named(key)
    if reference is None:
        known = ", ".join(entry.key for entry in at_hand.fitting(sex, profile.regions, device)) or "none"
        raise PolicyError(name, f"no reference {key!r} is at hand; of this sex, for {profile.name}, there are: {known}")
    against = list(misfits(reference, sex, profile.regions, device))
    if not against and not reference.verified_by_site:
        against = ["this site has not verified it (a file of its own in OSTEOGATE_REFERENCES_DIR says so)"]
    if against:
        raise PolicyError(name, f"{key} cannot be chosen under {profile.name}: {'; '.join(against)}")
    return reference


# Kernels


def kernel_rank(kernel: str, patterns: tuple[str, ...]) -> int | None:
    """Where on the allow-list a kernel stands (0 is the preferred one); None where it is not listed."""
    wanted = kernel.strip().casefold()
    for rank, pattern in enumerate(patterns):
        if wanted == pattern.casefold() or _in_span(wanted, pattern):
            return rank
    return None


def _span(pattern: str) -> tuple[str, int, int] | None:
    """A range pattern as (family, lowest, highest): "Br36-Br44" -> ("br", 36, 44)."""
    low, dash, high = pattern.casefold().partition("-")
    first, last = _LETTERS_AND_NUMBER.fullmatch(low), _LETTERS_AND_NUMBER.fullmatch(high)
    if not dash or first is None or last is None or first[1] != last[1] or int(first[2]) > int(last[2]):
        return None
    return first[1], int(first[2]), int(last[2])


def _in_span(kernel: str, pattern: str) -> bool:
    span, found = _span(pattern), _LETTERS_AND_NUMBER.fullmatch(kernel)
    if span is None or found is None:
        return False
    family, low, high = span
    return found[1] == family and len(found[2]) < 6 and low <= int(found[2]) <= high

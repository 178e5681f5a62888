"""Criteria profiles: published thresholds of bone density, each as a value with its exact comparison and its source.

| profile | osteoporosis range | osteopenia range | regions |
|---|---|---|---|
| YOSHIDA_2023 (default) | < 70 % YAM | < 80 % YAM | L1-L4 |
| JSBMR_2012 | <= 70 % YAM, or T <= -2.5 | T < -1.0 | L1-L4, L2-L4 |
| WHO | T <= -2.5 | T < -1.0 | L1-L4 |

A site chooses one in its policy (`referral.criteria`) and changes none of its numbers: a profile under a published
name holds what was published. A range is no diagnosis: what the criteria ask for beside density (history, other
sites) stands in `notes`, and is never assumed.

[S] was read in the source; [K] is general knowledge that nobody here has verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from service.domain.bone import Reference, percent_yam, t_score
from service.domain.figures import ARITHMETIC_DIGITS

YOSHIDA = "Yoshida 2023, doi 10.1097/RCT.0000000000001437 [S]"
JSBMR = "JSBMR 2012 criteria [S]"
WHO_SOURCE = "WHO criteria [K] unverified: for the site to verify"


class Scale(StrEnum):
    """What a threshold is given in."""

    PERCENT_YAM = "% YAM"
    T_SCORE = "T"


class DensityRange(StrEnum):
    """Where a density lies among a profile's thresholds."""

    OSTEOPOROSIS = "osteoporosis range"
    OSTEOPENIA = "osteopenia range"
    ABOVE = "above the thresholds"


@dataclass(frozen=True, slots=True)
class Cut:
    """One threshold; a density below it meets it, and one exactly at it where it is `inclusive`."""

    scale: Scale
    value: float
    inclusive: bool
    source: str

    def reading(self, bmd_g_cm2: float, reference: Reference) -> float:
        """The density on this threshold's scale."""
        relate = percent_yam if self.scale is Scale.PERCENT_YAM else t_score
        return round(relate(bmd_g_cm2, reference), ARITHMETIC_DIGITS)

    def met(self, bmd_g_cm2: float, reference: Reference) -> bool:
        """The density meets this threshold."""
        reading = self.reading(bmd_g_cm2, reference)
        return reading <= self.value if self.inclusive else reading < self.value

    def bmd_g_cm2(self, mean_g_cm2: float, sd_g_cm2: float) -> float:
        """The threshold in g/cm2 for young adults of this mean and SD."""
        if self.scale is Scale.PERCENT_YAM:
            return self.value / 100 * mean_g_cm2
        return mean_g_cm2 + self.value * sd_g_cm2

    def margin(self, percent: float, reference: Reference) -> float:
        """A margin of so many % YAM on this threshold's scale."""
        if self.scale is Scale.PERCENT_YAM:
            return percent
        return percent / 100 * reference.mean_g_cm2 / reference.sd_g_cm2

    @property
    def sign(self) -> str:
        """The comparison as tables write it: < or <=."""
        return "<=" if self.inclusive else "<"

    @property
    def limit(self) -> str:
        """The threshold with its scale: "70 % YAM", "T -2.5"."""
        return f"{self.value:g} % YAM" if self.scale is Scale.PERCENT_YAM else f"T {self.value:g}"

    @property
    def words(self) -> str:
        """The threshold as a sentence tells it: "below 70 % YAM", "at or below T -2.5"."""
        return f"{'at or below' if self.inclusive else 'below'} {self.limit}"


@dataclass(frozen=True, slots=True)
class CriteriaProfile:
    """One set of criteria; any threshold of a range that is met puts the density into that range."""

    name: str
    osteoporosis: tuple[Cut, ...]
    osteopenia: tuple[Cut, ...]
    regions: tuple[str, ...]  # of the reference, the allowed ones
    history: Cut | None = None  # counts only with a history that no CT tells
    history_words: str = ""
    notes: tuple[str, ...] = ()

    def range_of(self, bmd_g_cm2: float, reference: Reference) -> tuple[DensityRange, Cut]:
        """The range, and the threshold that was met; above all of them, the one that refers."""
        for found, cuts in ((DensityRange.OSTEOPOROSIS, self.osteoporosis), (DensityRange.OSTEOPENIA, self.osteopenia)):
            for cut in cuts:
                if cut.met(bmd_g_cm2, reference):
                    return found, cut
        return DensityRange.ABOVE, self.referring(reference)

    def referring(self, reference: Reference) -> Cut:
        """The threshold that a falling density meets first: below it, a person is referred."""
        return _first_met((*self.osteopenia, *self.osteoporosis), reference.mean_g_cm2, reference.sd_g_cm2)

    def unknown_history(self, bmd_g_cm2: float, reference: Reference) -> str | None:
        """What the criteria would count with a history that is not known here; None where none is asked for."""
        met = self.history is not None and self.history.met(bmd_g_cm2, reference)
        settled = any(cut.met(bmd_g_cm2, reference) for cut in self.osteoporosis)
        return self.history_words if met and not settled else None


def _first_met(cuts: Sequence[Cut], mean_g_cm2: float, sd_g_cm2: float) -> Cut:
    """The threshold that a falling density meets first, for young adults of this mean and SD."""
    return max(cuts, key=lambda cut: cut.bmd_g_cm2(mean_g_cm2, sd_g_cm2))


def _percent(value: float, source: str, *, inclusive: bool = False) -> Cut:
    return Cut(Scale.PERCENT_YAM, value, inclusive, source)


def _t(value: float, source: str, *, inclusive: bool = False) -> Cut:
    return Cut(Scale.T_SCORE, value, inclusive, source)


YOSHIDA_2023 = CriteriaProfile(
    name="YOSHIDA_2023",
    osteoporosis=(_percent(70.0, YOSHIDA),),
    osteopenia=(_percent(80.0, YOSHIDA),),
    regions=("L1-L4",),
    notes=("The paper's patient value is the mean of L1-L4.",),
)

JSBMR_2012 = CriteriaProfile(
    name="JSBMR_2012",
    osteoporosis=(_percent(70.0, JSBMR, inclusive=True), _t(-2.5, JSBMR, inclusive=True)),
    osteopenia=(_t(-1.0, JSBMR),),
    regions=("L1-L4", "L2-L4"),
    history=_percent(80.0, JSBMR),
    history_words="JSBMR_2012 also counts a density below 80 % YAM with a fragility fracture other than of vertebra or "
    "hip: no CT tells that history, and none was assumed.",
    notes=(
        "A density below 80 % YAM counts with a fragility fracture other than of vertebra or hip: "
        "no CT tells that history, so the reasons say it and nothing assumes it.",
        "The criteria take the lowest of several sites; a CT of the lumbar spine gives that one.",
        "Their young adults are 20 to 44 years for the lumbar spine.",
    ),
)

WHO = CriteriaProfile(
    name="WHO",
    osteoporosis=(_t(-2.5, WHO_SOURCE, inclusive=True),),
    osteopenia=(_t(-1.0, WHO_SOURCE),),
    regions=("L1-L4",),
    notes=(
        "[K] Meant for women after menopause and men of 50 and more: whether a patient is one of them is for the "
        "reader to judge; nothing here asks.",
    ),
)

PROFILES = {profile.name: profile for profile in (YOSHIDA_2023, JSBMR_2012, WHO)}


def definitions(profile: CriteriaProfile, young_adults: Mapping[str, Reference]) -> dict[str, dict[str, Any]]:
    """What an evaluation counts as osteopenia and osteoporosis (`models.evaluation.Definition`), by these criteria.

    Each is the threshold that a falling density meets first, in g/cm2 for the young adults of each sex; osteopenia's
    is the one that refers. Empty without young adults.
    """
    if not young_adults:
        return {}
    ranges = {"osteopenia": (*profile.osteopenia, *profile.osteoporosis), "osteoporosis": profile.osteoporosis}
    return {name: _definition(profile.name, cuts, young_adults) for name, cuts in ranges.items()}


def _definition(profile: str, cuts: Sequence[Cut], young_adults: Mapping[str, Reference]) -> dict[str, Any]:
    young = {sex: (one.mean_g_cm2, one.sd_g_cm2) for sex, one in young_adults.items()}
    first = {sex: _first_met(cuts, *of) for sex, of in young.items()}
    met = tuple(dict.fromkeys(first.values()))
    return {
        "words": f"{profile}: {cuts_in_words(met)}",
        "young_adult_bmd": {sex: mean for sex, (mean, _) in young.items()},
        "cut_g_cm2": {sex: cut.bmd_g_cm2(*young[sex]) for sex, cut in first.items()},
        "inclusive": all(cut.inclusive for cut in met),
    }


def cuts_on(scale: Scale) -> tuple[float, ...]:
    """Every threshold that any profile has on this scale: a figure must not seem to lie across one of them."""
    cuts = [cut for one in PROFILES.values() for cut in (*one.osteoporosis, *one.osteopenia, one.history) if cut]
    return tuple(sorted({cut.value for cut in cuts if cut.scale is scale}))


def cuts_in_words(cuts: Sequence[Cut]) -> str:
    """A range's thresholds as a table writes them: "<= 70 % YAM or T <= -2.5"."""
    return " or ".join(
        f"{cut.sign} {cut.value:g} % YAM" if cut.scale is Scale.PERCENT_YAM else f"T {cut.sign} {cut.value:g}"
        for cut in cuts
    )

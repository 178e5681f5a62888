"""%YAM and T, and when they are withheld."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.domain.bone import (
    Reference,
    ReferenceOrigin,
    References,
    digital_section,
    load_references,
    percent_yam,
    t_score,
)
from service.domain.errors import ReferenceDataError
from service.domain.reasons import Code, Reason

DIGITAL = Reference(
    key="women",
    provenance=ReferenceOrigin.DIGITAL,
    device="Lunar",
    region="L1-L4",
    sex="F",
    population='simulated "20-44" years',
    mean_g_cm2=1.2,
    sd_g_cm2=0.1,
    source="osteogate phantom, seed 1",
)


def test_percent_and_score_by_hand() -> None:
    assert percent_yam(0.9, DIGITAL) == pytest.approx(75.0)
    assert t_score(0.9, DIGITAL) == pytest.approx(-3.0)


def test_every_published_reference_has_its_provenance_and_ships_unverified() -> None:
    published = [one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED]
    assert len(published) == 5
    assert all(one.source.startswith(("[S]", "[K]")) and not one.verified_by_site for one in published)


@pytest.mark.parametrize(
    ("sex", "synthetic", "why"),
    [
        (None, True, "sex is not given"),
        ("O", False, "sex is not given"),
        ("M", True, "no digital young-adult cohort (men, Lunar, L1-L4) has been made"),
        ("F", False, "us-f-l1l4-lunar fits, but this site has not verified it"),
        ("M", False, "no reference fits (men, Lunar, L1-L4)"),
    ],
)
def test_where_none_fits_the_values_are_withheld_and_why(sex: str | None, synthetic: bool, why: str) -> None:
    published = [one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED]
    answer = References((*published, DIGITAL)).reference_for(sex, synthetic=synthetic)
    assert isinstance(answer, Reason)
    assert answer.code is Code.REFERENCE_WITHHELD
    assert why in answer.text


def test_digital_and_real_patients_never_share_a_reference() -> None:
    references = References((DIGITAL,))
    assert references.reference_for("F", synthetic=True) == DIGITAL
    assert isinstance(references.reference_for("F", synthetic=False), Reason)


def test_a_site_can_vouch_for_a_reference_that_fits() -> None:
    answer = load_references().verified(["us-f-l1l4-lunar"]).reference_for("F", synthetic=False)
    assert isinstance(answer, Reference)
    assert (answer.key, answer.verified_by_site) == ("us-f-l1l4-lunar", True)


def test_vouching_makes_no_wrong_device_fit() -> None:
    answer = load_references().verified(["us-m-hologic-nhanes"]).reference_for("M", synthetic=False)
    assert isinstance(answer, Reason)


def test_nobody_can_vouch_for_what_is_not_there() -> None:
    with pytest.raises(ReferenceDataError, match="nobody"):
        load_references().verified(["nobody"])


def test_a_digital_section_reads_back() -> None:
    text = digital_section([DIGITAL, replace(DIGITAL, key="men", sex="M")])
    assert load_references(text) == References((DIGITAL, replace(DIGITAL, key="men", sex="M")))


@pytest.mark.parametrize(
    "text",
    [
        "no toml",
        "[invented.x]\nmean_g_cm2 = 1.0",
        "[published]\nx = 3",
        "[published.x]\nmean_g_cm2 = 1.0",
        digital_section([DIGITAL]).replace("1.2", "-1.2"),
        digital_section([DIGITAL]).replace("1.2", "nan"),
        digital_section([DIGITAL]).replace('"F"', '"O"'),
        digital_section([DIGITAL]) + "verified_by_site = true",
    ],
)
def test_a_damaged_table_is_refused(text: str) -> None:
    with pytest.raises(ReferenceDataError):
        load_references(text)

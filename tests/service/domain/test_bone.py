"""References as data: what a file must tell, whom one may be chosen for, and the words that stand beside %YAM."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from service.domain.bone import (
    Reference,
    ReferenceOrigin,
    References,
    digital_section,
    load_references,
    misfits,
    percent_yam,
    read_references,
    reference_words,
    t_score,
)
from service.domain.errors import ReferenceDataError

DIGITAL = Reference(
    key="women",
    provenance=ReferenceOrigin.DIGITAL,
    device="Lunar",
    region="L1-L4",
    sex="F",
    ages="20-44",
    population='simulated "20-44" years',
    mean_g_cm2=1.2,
    sd_g_cm2=0.1,
    source="osteogate phantom, seed 1",
    version="1",
)

SITE_FILE = """\
[published.ours-f]
device = "Lunar"
model = "Prodigy"
region = "L1-L4"
sex = "F"
ages = "20-44"
population = "our region"
mean_g_cm2 = 1.15
sd_g_cm2 = 0.11
source = "our own DXA, 400 women"
version = "2"
verified_by_site = true
verified_by = "M. Physicist"
verified_on = 2026-11-23
"""


def test_percent_and_score_by_hand() -> None:
    assert percent_yam(0.9, DIGITAL) == pytest.approx(75.0)
    assert t_score(0.9, DIGITAL) == pytest.approx(-3.0)


# What ships


def test_every_published_reference_has_its_provenance_and_ships_unverified() -> None:
    published = [one for one in load_references().entries if one.provenance is ReferenceOrigin.PUBLISHED]
    assert len(published) == 5
    assert all(one.source.startswith(("[S]", "[K]")) and not one.verified_by_site for one in published)
    assert all(one.version and one.ages and one.region for one in published)


def test_each_sex_has_its_digital_cohort() -> None:
    shipped = load_references()
    for sex in ("F", "M"):
        cohort = shipped.digital(sex)
        assert cohort is not None
        assert (cohort.sex, cohort.ages) == (sex, "20-44")
    assert References(()).digital("F") is None


# Whom a reference may be chosen for


@pytest.mark.parametrize(
    ("key", "sex", "regions", "why"),
    [
        ("us-f-l1l4-lunar", "F", ("L1-L4",), ()),
        ("us-f-l1l4-lunar", "M", ("L1-L4",), ("for women, not for men",)),
        ("japan-f-l2l4-lunar-dpx", "F", ("L1-L4",), ("for L2-L4, and the criteria allow L1-L4",)),
        ("japan-f-l2l4-lunar-dpx", "F", ("L1-L4", "L2-L4"), ()),
        ("us-m-hologic-nhanes", "M", ("L1-L4",), ("for Hologic, and this site's BMD is Lunar's",)),
        ("young-f-l1l4", "F", ("L1-L4",), ("digital patients",)),
        ("japan-f-l2l4-hologic", "M", ("L1-L4",), ("Hologic", "L2-L4", "not for men")),
    ],
)
def test_what_does_not_fit_is_told_in_full(key: str, sex: str, regions: tuple[str, ...], why: tuple[str, ...]) -> None:
    reference = load_references().named(key)
    assert reference is not None
    found = misfits(reference, sex, regions)
    assert len(found) == len(why)
    assert all(words in told for words, told in zip(why, found, strict=True))


def test_the_fitting_ones_are_published_and_of_the_sex() -> None:
    shipped = load_references()
    assert [one.key for one in shipped.fitting("F", ("L1-L4",))] == ["us-f-l1l4-lunar"]
    assert [one.key for one in shipped.fitting("F", ("L1-L4", "L2-L4"))] == [
        "japan-f-l2l4-lunar-dpx",
        "us-f-l1l4-lunar",
    ]
    assert shipped.fitting("M", ("L1-L4", "L2-L4")) == ()


# A site's own files


def test_a_sites_own_reference_is_at_hand_beside_the_shipped_ones() -> None:
    at_hand = load_references({"ours.toml": SITE_FILE})
    ours = at_hand.named("ours-f")
    assert ours is not None
    assert (ours.verified_by_site, ours.verified_by, ours.verified_on) == (True, "M. Physicist", date(2026, 11, 23))
    assert set(load_references().entries) < set(at_hand.entries)
    assert load_references().named("ours-f") is None  # nothing stays behind


def test_a_site_verifies_a_shipped_entry_by_the_same_numbers() -> None:
    shipped = load_references().named("us-f-l1l4-lunar")
    assert shipped is not None
    same = SITE_FILE.replace("ours-f", shipped.key).replace('"Prodigy"', '""')
    same = same.replace("1.15", str(shipped.mean_g_cm2)).replace("0.11", str(shipped.sd_g_cm2))
    verified = load_references({"us.toml": same}).named(shipped.key)
    assert verified is not None
    assert verified.verified_by_site
    assert verified.holds_for == shipped.holds_for
    with pytest.raises(ReferenceDataError, match=r"us\.toml: us-f-l1l4-lunar: ships with Osteogate with other values"):
        load_references({"us.toml": same.replace(str(shipped.mean_g_cm2), "1.19")})


def test_one_key_stands_in_one_file() -> None:
    with pytest.raises(ReferenceDataError, match=r"b\.toml: ours-f: stands in two files"):
        load_references({"a.toml": SITE_FILE, "b.toml": SITE_FILE})


def test_a_site_has_no_digital_cohort_of_its_own() -> None:
    with pytest.raises(ReferenceDataError, match="digital cohorts ship with Osteogate"):
        load_references({"a.toml": digital_section([DIGITAL])})


# The words that stand beside %YAM and T


def test_the_words_tell_authority_and_verification() -> None:
    (ours,) = read_references(SITE_FILE)
    assert ours.words == (
        "ours-f, version 2: our region, women, ages 20-44, L1-L4, Lunar Prodigy; our own DXA, 400 women; "
        "verified by M. Physicist on 2026-11-23"
    )
    assert "verified" not in DIGITAL.words


def test_a_document_tells_the_words_of_the_reference_that_was_used() -> None:
    assert reference_words({"patient": {"reference": {"key": "ours-f", "text": "ours-f, version 2"}}}) == (
        "ours-f, version 2"
    )
    assert reference_words({"patient": {"reference": None}}) is None


# Damaged files


def test_a_digital_section_reads_back() -> None:
    cohorts = (DIGITAL, replace(DIGITAL, key="men", sex="M"))
    assert read_references(digital_section(cohorts)) == cohorts


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no toml", "not valid TOML"),
        ("[invented.x]\nmean_g_cm2 = 1.0", "unknown table invented"),
        ("published = 3", "published must hold tables"),
        ("[published]\nx = 3", "must be a table"),
        ("[published.x]\nmean_g_cm2 = 1.0", "missing"),
        (SITE_FILE.replace("1.15", "-1.15"), "numbers above 0"),
        (SITE_FILE.replace("1.15", "nan"), "numbers above 0"),
        (SITE_FILE.replace("1.15", "1"), "numbers above 0"),  # a whole number was hardly meant
        (SITE_FILE.replace('"F"', '"O"'), "sex F or M"),
        (SITE_FILE.replace('"F"', "[]"), "sex F or M"),
        (SITE_FILE.replace('ages = "20-44"', 'ages = " "'), "must be texts"),
        (SITE_FILE.replace('"Prodigy"', "3"), "model must be a text"),
        (SITE_FILE.replace("version", "edition"), "unknown ['edition'], missing ['version']"),
        (SITE_FILE.replace("site = true", 'site = "yes"'), "true or false"),
        (SITE_FILE.replace('verified_by = "M. Physicist"\n', ""), "needs verified_by"),
        (SITE_FILE.replace('"M. Physicist"', '" "'), "needs verified_by"),
        (SITE_FILE.replace("verified_on = 2026-11-23\n", ""), "needs verified_by"),
        (SITE_FILE.replace("2026-11-23", '"last week"'), "needs verified_by"),
        (SITE_FILE.replace("2026-11-23", "2026-11-23T10:00:00"), "needs verified_by"),
        (SITE_FILE.replace("site = true", "site = false"), "belong to verified_by_site = true"),
        (SITE_FILE.replace("published", "digital"), "not for a site to verify"),
    ],
)
def test_a_damaged_file_is_refused_and_named(text: str, why: str) -> None:
    with pytest.raises(ReferenceDataError) as caught:
        read_references(text, "ours.toml")
    assert "ours.toml" in str(caught.value)
    assert why in str(caught.value)

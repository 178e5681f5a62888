"""The one table of vertebrae against the tables of others."""

from __future__ import annotations

import pytest
from pydicom.sr.codedict import codes as dictionary
from pydicom.sr.coding import Code

from service.dicom.reports import codes as reported
from service.domain.vertebrae import BY_CODE, LUMBAR, VERTEBRAE


def coded(text: str) -> Code:
    scheme, value = text.split(":")
    return Code(value, scheme, "")


@pytest.mark.parametrize("vertebra", VERTEBRAE, ids=lambda one: one.name)
def test_each_code_is_the_public_dictionarys(vertebra) -> None:
    if vertebra.name in ("sacrum", "S1", "L6"):
        return
    assert coded(vertebra.code) == getattr(dictionary.SCT, f"{vertebra.name}Vertebra")
    assert vertebra.retired_code is not None
    assert coded(vertebra.retired_code) == coded(vertebra.code)  # pydicom equates SNOMED-RT with SNOMED CT


def test_our_reports_carry_the_same_codes() -> None:
    by_name = {one.name: one for one in VERTEBRAE}
    for name, code in reported.VERTEBRAE.items():
        assert by_name[name].code == f"{code.scheme_designator}:{code.value}"


def test_a_code_names_one_vertebra() -> None:
    assert len({one.class_id for one in VERTEBRAE}) == len({one.name for one in VERTEBRAE}) == len(VERTEBRAE)
    assert len(BY_CODE) == 2 * len(VERTEBRAE) - 2  # S1 and L6 have one code only
    assert set(LUMBAR) <= {one.name for one in VERTEBRAE}

"""What a site gave us, read at start: its policy file, and its folder of references."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.cli import main
from service.doctor import examine
from service.domain.bone import load_references
from service.domain.errors import PolicyError, ReferenceDataError
from service.domain.policy import DEFAULT_POLICY
from service.settings import Settings
from service.workflow.rules import policy_in_force, references_at_hand
from tests.conftest import ROOT

SHIPPED = ROOT / "service" / "domain" / "references"
KEY = "japan-f-l2l4-lunar-dpx"
CHOICE = f'[referral]\ncriteria = "JSBMR_2012"\nreference_female = "{KEY}"\n'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A site as README tells it: the shipped file copied, its mark set, who and when; then chosen in the policy."""
    text = (SHIPPED / "japan_lunar_dpx.toml").read_text(encoding="utf-8")
    mark = 'verified_by_site = true\nverified_by = "M. Physicist, radiology"\nverified_on = 2026-11-23'
    folder = tmp_path / "references"
    folder.mkdir()
    (folder / "japan.toml").write_text(text.replace("verified_by_site = false", mark), encoding="utf-8")
    (tmp_path / "policy.toml").write_text(CHOICE, encoding="utf-8")
    return Settings(data_dir=tmp_path, policy_file=tmp_path / "policy.toml", references_dir=folder)


def test_without_files_the_built_in_rules_are_in_force() -> None:
    assert policy_in_force(Settings()) == DEFAULT_POLICY


def test_a_site_verifies_and_chooses_a_reference(settings: Settings) -> None:
    women = policy_in_force(settings).reference_for("F")
    assert women is not None
    assert (women.key, women.verified_by) == (KEY, "M. Physicist, radiology")
    finding = next(one for one in examine(settings) if one.part == "policy")
    assert finding.good
    assert f"references for real patients: {KEY}" in finding.text


def test_the_doctor_tells_a_model_of_another_densitometer(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text('[pairing]\ndensitometer = "Hologic"\n', encoding="utf-8")
    for file, amiss in ((None, False), (tmp_path / "policy.toml", True)):
        found = examine(Settings(data_dir=tmp_path, policy_file=file))
        model = next(one for one in found if one.part == "model")
        assert ("predicts what GE Lunar measures, and this site pairs Hologic" in model.text) is amiss


def test_without_the_sites_own_file_the_choice_is_refused(settings: Settings) -> None:
    unverified = settings.model_copy(update={"references_dir": None})
    with pytest.raises(PolicyError, match=f"{KEY} cannot be chosen under JSBMR_2012: this site has not verified it"):
        policy_in_force(unverified)
    finding = next(one for one in examine(unverified) if one.part == "policy")
    assert not finding.good
    assert "has not verified it" in finding.text


@pytest.mark.parametrize("name", ["empty", "absent"])
def test_a_folder_without_references_is_a_mistake(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    folder = tmp_path / name
    with pytest.raises(ReferenceDataError, match="OSTEOGATE_REFERENCES_DIR"):
        references_at_hand(folder)


def test_a_damaged_file_is_named_even_where_nothing_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "ours.toml").write_text("[published.x]\nsex = 'F'\n", encoding="utf-8")
    with pytest.raises(ReferenceDataError, match=r"ours\.toml: x"):
        policy_in_force(Settings(references_dir=tmp_path))


def test_the_shipped_folder_is_a_sites_folder_but_for_the_digital_cohorts(tmp_path: Path) -> None:
    for file in SHIPPED.glob("*.toml"):
        if file.name != "digital.toml":
            (tmp_path / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    assert set(references_at_hand(tmp_path).entries) == set(load_references().entries)


@pytest.mark.parametrize("command", ["up", "worker", "web"])
def test_a_process_says_at_start_what_does_not_fit(
    command: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OSTEOGATE_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("OSTEOGATE_POLICY_FILE", str(settings.policy_file))
    assert main([command]) == 1
    told = capsys.readouterr().err
    assert "referral.reference_female" in told.replace("\n", "")
    assert "has not verified it" in " ".join(told.split())
    assert "Traceback" not in told

"""The shipped package on unseen digital patients; random weights fail the same checks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.inputs import network_input
from models.package import ModelPackage, PackageError, Scanner, write_package
from models.phantom.anatomy import LEVELS
from models.phantom.cohort import draw_member, patient_slabs
from models.readout import PRINTED_BETWEEN, Readout, widened
from models.resnet50 import BonePredictor, NetworkConfig, infer, load_network
from worker import predict, start
from worker.predict import DeviceError, Prediction, Predictor, find_device, has_bf16

PACKAGES = Path(__file__).resolve().parents[2] / "models" / "packages"
REFERENCE = PACKAGES / start.REFERENCE
DIGITAL = Scanner(digital=True)
BMD = (0.65, 0.95, 1.25)  # low, middle, high, g/cm2


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.set_num_threads(1)
    return Predictor(REFERENCE, "cpu")


@pytest.fixture(scope="module")
def patients() -> list[tuple[float, np.ndarray]]:
    """True BMD and slabs [4, 3, 128, 128] of digital patients whose seeds no training cohort has."""
    made = []
    for number, bmd in enumerate(BMD):
        patient = draw_member(990_000_001 + number, {"bmd_g_cm2": bmd, "slice_mm": 3.0, "sex": "F"}, enriched=False)
        slabs = patient_slabs(patient, 2)
        made.append((slabs.truth.bmd_g_cm2, slabs.slabs[:, 1]))  # cut with imperfect labels
    return made


def follows_truth(predictor: Predictor, patients: list[tuple[float, np.ndarray]]) -> bool:
    """Low < middle < high, well apart, and nobody off by as much as the steps between them."""
    seen = [predictor.patient(predictor.predict(slabs, LEVELS)).bmd_g_cm2 for _, slabs in patients]
    true = [truth for truth, _ in patients]
    return bool(np.diff(seen).min() > 0.08 and np.abs(np.subtract(seen, true)).max() < 0.2)


def test_the_shipped_package_follows_the_truth(predictor: Predictor, patients: list[tuple[float, np.ndarray]]) -> None:
    assert follows_truth(predictor, patients)


def test_random_weights_do_not(predictor: Predictor, patients: list[tuple[float, np.ndarray]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = BonePredictor(NetworkConfig(channels=predictor.input.channels))
    torch.nn.init.normal_(network.head.weight, std=0.01)
    network.target_mean.copy_(torch.tensor([1.0, 1.36]))
    network.target_std.copy_(torch.tensor([0.2, 0.13]))
    random = write_package(tmp_path / "random", predictor.package.manifest, network.tensors(), "# none\n")
    assert not follows_truth(Predictor(random.path, "cpu"), patients)


def test_every_vertebra_has_values_and_intervals(
    predictor: Predictor, patients: list[tuple[float, np.ndarray]]
) -> None:
    predictions = predictor.predict(patients[2][1], LEVELS, scanner=DIGITAL)
    assert len(predictions) == len(LEVELS)
    for one in predictions:
        assert one.bmd_interval[0] < one.bmd_g_cm2 < one.bmd_interval[1]
        assert one.tbs_interval[0] < one.tbs < one.tbs_interval[1]
        assert 0.6 < one.tbs < 1.8
    whole = predictor.patient(predictions, DIGITAL)
    assert whole.bmd_g_cm2 == pytest.approx(np.mean([one.bmd_g_cm2 for one in predictions]))
    assert width(whole) <= width(predictions[0])  # a mean is surer than one vertebra


def test_a_model_of_digital_patients_is_less_sure_of_people(
    predictor: Predictor, patients: list[tuple[float, np.ndarray]]
) -> None:
    """No machine's mineral was ever seen by it: what machines differ by comes on top of its own errors."""
    digital, real = (
        predictor.predict(patients[1][1], LEVELS, scanner=scanner) for scanner in (DIGITAL, Scanner("canon Aquilion"))
    )
    assert [one.bmd_g_cm2 for one in real] == [one.bmd_g_cm2 for one in digital]
    assert [one.tbs_interval for one in real] == [one.tbs_interval for one in digital]  # of TBS nothing is printed
    pairs = [(real[0], 1), (predictor.patient(real), 4)]
    for one, levels in pairs:
        half = predictor.package.manifest.interval(levels).bmd_g_cm2
        assert width(one) / 2 == pytest.approx(widened(half, PRINTED_BETWEEN["bmd_g_cm2"] * one.bmd_g_cm2))
        assert width(one) / 2 > 1.3 * half
    assert (predictor.knows(DIGITAL), predictor.knows(Scanner("canon Aquilion"))) == (True, False)


def width(prediction: Prediction) -> float:
    low, high = prediction.bmd_interval
    return high - low


def test_it_says_what_it_is(predictor: Predictor) -> None:
    assert predictor.synthetic_only
    assert predictor.name == start.REFERENCE
    assert predictor.sha256 == ModelPackage.load(REFERENCE).sha256
    assert predictor.device == "cpu"
    size = sum(file.stat().st_size for file in REFERENCE.iterdir())
    assert size < 50e6


def test_the_same_answer_every_time(predictor: Predictor, patients: list[tuple[float, np.ndarray]]) -> None:
    first = predictor.predict(patients[0][1], LEVELS)
    assert predictor.predict(patients[0][1], LEVELS) == first
    assert predictor.predict([], []) == []


def test_it_predicts_what_pytorch_does(predictor: Predictor, patients: list[tuple[float, np.ndarray]]) -> None:
    assert predictor.engine.startswith("OpenVINO ")
    cpu = torch.device("cpu")
    network = load_network(predictor.package, cpu)
    for _, slabs in patients:
        exact = infer(network, network_input(slabs, predictor.input), device=cpu)
        assert np.abs(predictor.answers(slabs) - exact).max() < 1e-4  # the issue allows 0.002
        readout = Readout.of(predictor.package)
        assert readout is not None
        ours = [(one.bmd_g_cm2, one.tbs) for one in predictor.predict(slabs, LEVELS)]
        assert np.abs(ours - readout(exact, list(slabs), LEVELS)).max() < 1e-3


def test_bf16_is_refused_where_the_hardware_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not has_bf16(torch.device("cpu"))
    with pytest.raises(DeviceError, match="bf16"):
        Predictor(REFERENCE, "cpu", "bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert has_bf16(torch.device("cpu"))


def test_auto_takes_bf16_where_the_hardware_has_it_and_stays_within_what_is_promised(
    predictor: Predictor, patients: list[tuple[float, np.ndarray]]
) -> None:
    auto = Predictor(REFERENCE, "cpu", "auto")
    assert auto.precision == ("bf16" if has_bf16(torch.device("cpu")) else "fp32")
    assert auto.engine.endswith(auto.precision)  # stands in the result's provenance
    for _, slabs in patients:
        values, exact = (
            np.array([(one.bmd_g_cm2, one.tbs) for one in some.predict(slabs, LEVELS)]) for some in (auto, predictor)
        )
        assert np.abs(values - exact).max() < 0.002  # g/cm2, and TBS; README, Settings


def test_nothing_is_compiled_before_the_package_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compiled an altered package")

    monkeypatch.setattr(predict, "load_network", never)
    monkeypatch.setattr(predict, "fastest", never)
    for file in REFERENCE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(PackageError, match=r"weights\.safetensors"):
        Predictor(tmp_path, "cpu")


def test_an_altered_package_is_refused_by_file(tmp_path: Path) -> None:
    for file in REFERENCE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    card = tmp_path / "model_card.md"
    card.write_text(card.read_text().replace("Investigational", "Approved"))
    with pytest.raises(PackageError, match=r"model_card\.md"):
        Predictor(tmp_path, "cpu")


def test_no_hidden_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="cuda"):
        find_device("cuda")
    assert find_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="not supported"):
        find_device("mps")


def test_no_vertebra_is_no_patient(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="at least one"):
        predictor.patient([])


def test_the_interval_of_a_mean_is_that_of_its_own_number_of_vertebrae(
    predictor: Predictor, patients: list[tuple[float, np.ndarray]]
) -> None:
    predictions = predictor.predict(patients[1][1], LEVELS, scanner=DIGITAL)
    known = predictor.package.manifest.intervals
    assert len({(one.bmd_g_cm2, one.tbs) for one in known}) == len(known) == 4  # no two of them are alike
    for one in known:
        whole = predictor.patient(predictions[: one.levels], DIGITAL)
        assert width(whole) / 2 == pytest.approx(one.bmd_g_cm2)
        assert whole.tbs_interval is not None
        assert (whole.tbs_interval[1] - whole.tbs_interval[0]) / 2 == pytest.approx(one.tbs)

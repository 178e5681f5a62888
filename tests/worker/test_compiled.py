"""The compiled network equals PyTorch; what cannot be compiled is predicted with PyTorch, and says so."""

import dataclasses
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.resnet50 import BonePredictor, Floats, NetworkConfig, has_bf16, infer
from models.spine_unet import FINE, build
from worker import compiled
from worker.compiled import (
    BATCH,
    NotCompilable,
    OpenVinoEngine,
    TorchEngine,
    compile_for_cpu,
    fastest,
    fastest_volume,
    translate,
)

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def answering(architecture: str) -> BonePredictor:
    """Random weights and statistics, so that no value is hidden by a neutral one."""
    torch.manual_seed(1)
    network = BonePredictor(NetworkConfig(architecture))
    nn.init.normal_(network.head.weight, std=1.0)
    network.target_mean.copy_(torch.tensor([1.0, 1.36]))
    network.target_std.copy_(torch.tensor([0.2, 0.13]))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


def pictures(n: int, rows: int = 48, columns: int = 80) -> Floats:
    """From faint to bright, so that their answers differ."""
    brightness = np.linspace(0.2, 1.0, n, dtype=np.float32)[:, None, None, None]
    return brightness * np.random.default_rng(n).random((n, 3, rows, columns), dtype=np.float32)


@pytest.fixture(scope="module")
def network() -> BonePredictor:
    torch.set_num_threads(1)
    return answering("resnet18")


@pytest.fixture(scope="module")
def engine(network: BonePredictor) -> OpenVinoEngine:
    return compile_for_cpu(network, 1)


@pytest.mark.parametrize("architecture", ["resnet34", "resnet50"])
def test_other_networks_equal_pytorch(architecture: str) -> None:
    network = answering(architecture)
    exact = infer(network, pictures(2), device=CPU)
    assert np.abs(np.diff(exact, axis=0)).max() > 0.005  # the pictures do decide the answer
    assert np.allclose(compile_for_cpu(network, 1)(pictures(2)), exact, atol=2e-5)


@pytest.mark.parametrize("n", [*range(1, 9), BATCH + 1])
def test_any_number_of_pictures(network: BonePredictor, engine: OpenVinoEngine, n: int) -> None:
    assert np.allclose(engine(pictures(n)), infer(network, pictures(n), device=CPU), atol=2e-5)


def test_any_size_of_picture_after_another(network: BonePredictor, engine: OpenVinoEngine) -> None:
    for rows, columns in ((48, 80), (96, 64), (48, 80)):
        seen = pictures(2, rows, columns)
        assert np.allclose(engine(seen), infer(network, seen, device=CPU), atol=2e-5)


def test_threads_do_not_mix_their_answers(engine: OpenVinoEngine) -> None:
    alone = [engine(pictures(n)) for n in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda n: engine(pictures(n)), [1, 2, 3, 4] * 4))
    for number, answer in enumerate(together):
        assert np.allclose(answer, alone[number % 4], atol=1e-5)


def test_the_cpu_gets_the_compiled_one_in_fp32(network: BonePredictor) -> None:
    made = fastest(network, CPU, "fp32", pictures(1))
    assert isinstance(made, OpenVinoEngine)
    assert made.name.startswith("OpenVINO 20")
    assert made.name.endswith(" fp32")
    assert all(_precision(request) == "f32" for request in made.requests)
    assert 1 <= len(made.requests) <= min(torch.get_num_threads(), compiled.STREAMS)


def _precision(request: Any) -> str:
    return str(request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").to_string())


@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_pictures_come_back_in_order_from_several_streams(network: BonePredictor, streams: int, n: int) -> None:
    made = compile_for_cpu(network, streams)
    assert len(made.requests) == streams
    seen = pictures(n)
    first = made(seen)
    made(pictures(n)[::-1])  # its answers are copies, not the engine's own memory
    assert np.allclose(first, infer(network, seen, device=CPU), atol=2e-5)


def test_a_stream_that_fails_leaves_none_at_work(network: BonePredictor) -> None:
    class Failing:
        def start_async(self, _: object) -> None: ...
        def wait(self) -> None:
            raise RuntimeError("out of memory")

    made = compile_for_cpu(network, 2)
    seen = pictures(4, 256, 256)  # as much work as would outlast the failure
    with pytest.raises(RuntimeError, match="out of memory"):
        OpenVinoEngine("one fails", [Failing(), made.requests[1]])(seen)
    assert np.allclose(made(pictures(4)), infer(network, pictures(4), device=CPU), atol=2e-5)


@pytest.mark.skipif(not has_bf16(CPU), reason="this CPU does not compute bf16")
def test_bf16_where_it_was_asked_for(network: BonePredictor) -> None:
    made = fastest(network, CPU, "bf16", pictures(1))
    assert isinstance(made, OpenVinoEngine)
    assert made.name.endswith(" bf16")
    assert all(_precision(request) == "bf16" for request in made.requests)
    assert np.allclose(made(pictures(3)), infer(network, pictures(3), device=CPU), atol=0.02)


def test_without_openvino_it_is_pytorch_and_the_log_says_so(
    network: BonePredictor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with caplog.at_level(logging.WARNING):
        made = fastest(network, CPU, "fp32", pictures(1))
    assert isinstance(made, TorchEngine)
    assert made.name == f"PyTorch {torch.__version__} fp32"
    assert "OpenVINO cannot be used" in caplog.text
    assert np.array_equal(made(pictures(2)), infer(network, pictures(2), device=CPU))


@pytest.mark.parametrize("wrong", [0.001, float("nan")])
def test_one_that_gives_other_values_is_not_taken(
    network: BonePredictor,
    engine: OpenVinoEngine,
    wrong: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Off:
        name = "OpenVINO that errs"

        def __call__(self, pictures: Floats) -> Floats:
            return engine(pictures) + np.float32(wrong)

    monkeypatch.setattr(compiled, "compile_for_cpu", lambda *_: Off())
    assert isinstance(fastest(network, CPU, "fp32", pictures(1)), TorchEngine)
    assert "OpenVINO that errs differs" in caplog.text


@pytest.mark.parametrize(
    ("module", "named"),
    [
        (nn.Conv2d(3, 3, 1, groups=3), "Conv2d"),
        (nn.MaxPool2d(3, 2, ceil_mode=True), "MaxPool2d"),
        (nn.BatchNorm2d(3, affine=False), "BatchNorm2d"),
        (nn.Flatten(2), "Flatten"),
        (nn.GELU(), "GELU"),
        (nn.ConvTranspose3d(3, 3, 2, 2, groups=3), "ConvTranspose3d"),
        (nn.InstanceNorm3d(3), "InstanceNorm3d"),
    ],
)
def test_an_operation_without_translation_is_refused_by_name(module: nn.Module, named: str) -> None:
    with pytest.raises(NotCompilable, match=named):
        translate(nn.Sequential(module).eval())


def test_training_mode_and_value_dependent_code_are_refused() -> None:
    class Wavers(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(NotCompilable, match="training mode"):
        translate(nn.Sequential(nn.ReLU()))
    with pytest.raises(NotCompilable, match="graph cannot be read"):
        translate(Wavers().eval())


def unet() -> nn.Module:
    """A small nnU-Net with random weights and four classes, norms included."""
    torch.manual_seed(3)
    made = build(dataclasses.replace(FINE, features=(4, 8, 12), convolutions=(1, 2, 1), classes=tuple("abcd")))
    for module in made.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return made.eval().requires_grad_(False)


def test_a_segmentation_network_gives_pytorchs_logits_in_tiles_of_any_size() -> None:
    network = unet()
    made = fastest_volume(network, CPU, torch.float32)
    assert made is not None
    rng = np.random.default_rng(4)
    for tile in ((32, 32, 32), (16, 40, 24)):
        patch = rng.standard_normal((1, 1, *tile), dtype=np.float32)
        plain = network(torch.from_numpy(patch)).numpy()
        assert np.abs(made(patch) - plain).max() < 1e-3 * plain.std()
        assert (made(patch).argmax(1) == plain.argmax(1)).mean() > 0.999


def test_a_segmentation_engine_that_gives_other_classes_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = compiled._compile

    class Off:
        name = "OpenVINO that errs"

        def __init__(self, engine: OpenVinoEngine) -> None:
            self.engine = engine

        def __call__(self, pictures: Floats) -> Floats:
            return np.roll(self.engine(pictures), 1, axis=1)

    monkeypatch.setattr(compiled, "_compile", lambda *given: Off(real(*given)))
    assert fastest_volume(unet(), CPU, torch.float32) is None
    assert "OpenVINO that errs gives other classes" in caplog.text
    assert fastest_volume(unet(), torch.device("cuda"), torch.float16) is None
    assert fastest_volume(unet(), CPU, torch.bfloat16) is None


def test_openvinos_telemetry_is_never_loaded_and_nothing_connects(tmp_path: Path) -> None:
    """A stand-in for the telemetry package lies on the path; a bare import of OpenVINO would load it."""
    folder = tmp_path / "openvino_telemetry"
    folder.mkdir()
    (folder / "__init__.py").write_text("print('TELEMETRY LOADED')\nraise ImportError\n")
    ours = (
        "import sys; sys.addaudithook(lambda event, _: print('CONNECTS') if event == 'socket.connect' else None)\n"
        "import torch; from worker.compiled import compile_for_cpu\n"
        "from models.resnet50 import BonePredictor, NetworkConfig; import numpy as np\n"
        "engine = compile_for_cpu(BonePredictor(NetworkConfig('resnet18')).eval(), 1)\n"
        "print(engine(np.zeros((1, 3, 48, 80), np.float32)).shape)\n"
    )
    bare = "import openvino"
    told = {
        script: subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        ).stdout
        for script in (ours, bare)
    }
    assert told[ours].splitlines() == ["(1, 2)"]
    assert "TELEMETRY LOADED" in told[bare]


def test_no_lock_holds_openvinos_telemetry() -> None:
    for lock in ROOT.glob("requirements*.lock"):
        assert "openvino-telemetry" not in lock.read_text()
    assert "openvino==" in (ROOT / "requirements-worker.lock").read_text()
    assert "openvino==" not in (ROOT / "requirements-service.lock").read_text()

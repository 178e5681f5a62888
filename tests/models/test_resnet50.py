"""The network: shapes, an honest untrained start, weights that fit or refuse."""

import copy

import numpy as np
import pytest
import torch

from models.resnet50 import (
    ARCHITECTURES,
    BonePredictor,
    NetworkConfig,
    PackageNetwork,
    check_input,
    infer,
    load_tensors,
    resolved_precision,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> BonePredictor:
    torch.manual_seed(0)
    made = BonePredictor(NetworkConfig())
    made.target_mean.copy_(torch.tensor([1.02, 1.36]))
    made.target_std.copy_(torch.tensor([0.22, 0.13]))
    return made.eval()


@pytest.fixture(scope="module")
def answering(network: BonePredictor) -> BonePredictor:
    """The same with a head that answers to the picture."""
    made = copy.deepcopy(network)
    torch.nn.init.normal_(made.head.weight, std=0.01)
    return made.eval()


def pictures(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).random((count, 3, 32, 48), dtype=np.float32)


def test_it_is_a_resnet50_with_one_joint_head(network: BonePredictor) -> None:
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == 23_508_032 + 2 * 2048 + 2  # torchvision's trunk without its classes
    assert infer(network, pictures(), device=CPU).shape == (3, 2)


def test_an_untrained_network_answers_with_the_mean(network: BonePredictor) -> None:
    answer = infer(network, pictures(), device=CPU)
    assert np.allclose(answer, [1.02, 1.36], atol=1e-6)


def test_batches_do_not_change_answers(answering: BonePredictor) -> None:
    many = infer(answering, pictures(5), device=CPU)
    one_by_one = infer(answering, pictures(5), device=CPU, batch=1)
    assert np.ptp(many[:, 0]) > 0
    assert np.allclose(many, one_by_one, atol=1e-5)
    assert infer(answering, pictures(0), device=CPU).shape == (0, 2)


def test_bf16_stays_close(answering: BonePredictor) -> None:
    exact = infer(answering, pictures(), device=CPU)
    assert np.allclose(infer(answering, pictures(), device=CPU, precision="bf16"), exact, atol=0.01)


def test_weights_travel(answering: BonePredictor) -> None:
    other = BonePredictor(NetworkConfig()).eval()
    load_tensors(other, answering.tensors())
    assert np.array_equal(infer(other, pictures(), device=CPU), infer(answering, pictures(), device=CPU))


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="resnet50"):
        NetworkConfig("lenet")


def test_weights_that_do_not_fit_are_refused(network: BonePredictor) -> None:
    tensors = network.tensors()
    del tensors["head.weight"]
    with pytest.raises(ValueError, match=r"head\.weight"):
        load_tensors(BonePredictor(NetworkConfig()), tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_backbone_answers(architecture: str) -> None:
    torch.manual_seed(0)
    network = BonePredictor(NetworkConfig(architecture, ("tbs",))).eval()
    size = 63 if architecture == "alexnet" else 32
    check_input(architecture, size, size)
    answer = infer(network, pictures(2)[:, :, :1, :1].repeat(size, 2).repeat(size, 3), device=CPU)
    assert answer.shape == (2, 1)
    assert not any(name.endswith(("fc.weight", "aux1.fc2.weight")) for name in network.tensors())


def test_a_picture_too_small_for_the_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="62 x 80 pixels are too few for alexnet"):
        check_input("alexnet", 62, 80)
    with pytest.raises(ValueError, match="14 x 14 pixels are too few for googlenet"):
        check_input("googlenet", 14, 14)
    check_input("googlenet", 15, 15)


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for native in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda native=native: {"avx512_bf16": native})
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        expected = "bf16" if native else "fp32"
        assert resolved_precision("auto", CPU) == resolved_precision("auto", cuda) == expected
        assert resolved_precision("fp32", CPU) == "fp32"
        assert resolved_precision("bf16", CPU) == "bf16"


def constant(value: float, *targets: str) -> BonePredictor:
    """A network that answers with one number."""
    made = BonePredictor(NetworkConfig("resnet18", targets))
    made.target_mean.fill_(value)
    return made.eval()


def test_a_member_of_one_target_contributes_to_it_alone() -> None:
    members = [constant(1.0, "bmd_g_cm2"), constant(3.0, "bmd_g_cm2"), constant(7.0, "tbs")]
    assert np.allclose(infer(PackageNetwork(members).eval(), pictures(), device=CPU), [2.0, 7.0])
    joint = PackageNetwork([constant(1.0, "bmd_g_cm2", "tbs"), members[2]]).eval()
    assert np.allclose(infer(joint, pictures(), device=CPU), [1.0, 4.0])
    with pytest.raises(ValueError, match="no network predicts tbs"):
        PackageNetwork(members[:2])


def test_exchanging_the_sides_is_the_mean_of_both_orders(answering: BonePredictor) -> None:
    given = pictures()
    both = PackageNetwork([answering], test_time="exchange-sides").eval()
    there, back = (infer(answering, one, device=CPU) for one in (given, given[:, ::-1]))
    assert not np.allclose(there, back, atol=1e-5)
    assert np.allclose(infer(both, given, device=CPU), (there + back) / 2, atol=1e-5)
    assert np.array_equal(infer(PackageNetwork([answering]).eval(), given, device=CPU), there)

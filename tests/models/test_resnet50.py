"""The network: shapes, an honest untrained start, weights that fit or refuse."""

import copy

import numpy as np
import pytest
import torch

from models.resnet50 import BonePredictor, NetworkConfig, infer, load_tensors

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

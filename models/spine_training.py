"""Train the built-in segmentation networks on digital patients; readable from top to bottom.

    python -m models.spine_training prepare --out CASES --patients 160 --first-seed 1
    python -m models.spine_training train --network coarse --cases CASES --out PACKAGE --steps 1500
    python -m models.spine_training train --network fine --cases CASES --out PACKAGE --steps 4000

`prepare` renders digital patients once and keeps them at both working resolutions. `train` draws a random
crop of a random patient at each step, deforms it softly, changes its intensities, optionally cuts the field
of view, and steps once. What is written (every `--save-every` steps) is a moving average of the weights, with
the sums that pin them. No real CT is ever read.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional

from models.phantom.grid import Grid
from models.phantom.patient import draw
from models.phantom.render import body_grid, render
from models.phantom.scanner import scan, scanner_rng
from models.resnet50 import has_bf16
from models.spine_unet import LABEL_IDS, NETWORKS, SpineUNetConfig, build, normalise, resample, write_network
from models.weight_files import CHECKPOINT, write_sums

FloatArray = npt.NDArray[np.float32]
LabelArray = npt.NDArray[np.uint8]

Scalar = TypeVar("Scalar", bound=np.generic)

MARGIN_MM = 45.0  # what the fine case keeps around the spine: more than the margin at prediction


@dataclass(frozen=True)
class TrainingConfig:
    """One training run; lengths in mm, intensities in HU, probabilities without unit."""

    steps: int = 2000
    batch: int = 1
    learning_rate: float = 2e-3
    warm_up: int = 50
    average: float = 0.995  # decay of the moving average of the weights
    seed: int = 1
    max_rotation_deg: float = 12.0
    max_scale: float = 0.18
    max_bend_mm: float = 7.0
    truncate: float = 0.35  # how often the field of view is cut at one or both ends
    extend: float = 0.35  # how often the pelvis is continued below the digital patient


# ------------------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True)
class Case:
    """One digital patient at one resolution: HU and class indices, both [z, y, x], z up, y forward, x to the
    right.
    """

    hu: npt.NDArray[np.int16]
    classes: LabelArray


def load_cases(folder: Path, network: str) -> list[Case]:
    """Every prepared patient of one network; a bad file stops the run."""
    cases = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as stored:
            cases.append(Case(stored[f"{network}_hu"], stored[f"{network}_classes"]))
    return cases


def class_indices(labels: LabelArray, config: SpineUNetConfig) -> LabelArray:
    """Label ids -> the network's class indices; ids that the network does not know become background."""
    table = np.zeros(256, dtype=np.uint8)
    for index, name in enumerate(config.classes):
        if name in LABEL_IDS:
            table[LABEL_IDS[name]] = index
    return table[labels]


# ----------------------------------------------------------------------------------------------- augmentation


def random_crop(
    case: Case, config: SpineUNetConfig, run: TrainingConfig, dice: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """One deformed, re-coloured patch: normalised [1, z, y, x] and class indices [z, y, x].

    Outside of the (possibly cut) field of view the patch is 0 after normalisation, as nnU-Net pads at
    prediction.
    """
    case = _extend_below(case, config, run, dice)
    case = _cut_field_of_view(case, config, run, dice)
    grid = _sampling_grid(case, config, run, dice)  # [1, z, y, x, 3]
    hu = torch.from_numpy(case.hu.astype(np.float32))[None, None]
    hu = functional.grid_sample(hu, grid, mode="bilinear", padding_mode="border", align_corners=True)
    classes = torch.from_numpy(case.classes.astype(np.float32))[None, None]
    classes = functional.grid_sample(classes, grid, mode="nearest", padding_mode="zeros", align_corners=True)
    inside = (grid.abs() <= 1.0).all(dim=-1)[:, None]
    recoloured = _recolour(hu, classes, config, dice)
    return (normalise(recoloured, config) * inside)[0], classes[0, 0].long()


def _extend_below(case: Case, config: SpineUNetConfig, run: TrainingConfig, dice: np.random.Generator) -> Case:
    """A longer pelvis: the lowest slice without its bone, repeated; `_foreign_bone` puts hips and thighs there."""
    if dice.random() > run.extend or int(case.classes[0].max(initial=0)) > 1:
        return case
    count = int(dice.integers(1, max(2, int(150 / config.spacing_mm[0]))))
    lowest = np.where(case.hu[0] > 120, 45, case.hu[0]).astype(np.int16)
    below = np.repeat(lowest[None], count, axis=0)
    nothing = np.zeros(below.shape, dtype=np.uint8)
    return Case(np.concatenate([below, case.hu]), np.concatenate([nothing, case.classes]))


def _cut_field_of_view(case: Case, config: SpineUNetConfig, run: TrainingConfig, dice: np.random.Generator) -> Case:
    height = case.hu.shape[0]
    shortest = int(70 / config.spacing_mm[0])
    if dice.random() > run.truncate or height <= shortest + 2:
        return case
    length = int(dice.integers(shortest, height))
    start = int(dice.choice([0, height - length, dice.integers(0, height - length + 1)]))
    part = slice(start, start + length)
    return Case(case.hu[part], case.classes[part])


def _sampling_grid(case: Case, config: SpineUNetConfig, run: TrainingConfig, dice: np.random.Generator) -> Tensor:
    """Where the patch's voxels lie in the case: a random affine plus a smooth random bend. Shape [1, z, y, x,
    3].
    """
    patch = np.array(config.patch_size)
    shape = np.array(case.hu.shape)
    angles = np.deg2rad(dice.uniform(-run.max_rotation_deg, run.max_rotation_deg, 3))
    scale = dice.uniform(1 - run.max_scale, 1 + run.max_scale) * dice.uniform(0.94, 1.06, 3)
    mirror = np.array([1.0, 1.0, dice.choice([-1.0, 1.0])])
    matrix = _rotation(angles) @ np.diag(scale * mirror)
    centre = _patch_centre(case, patch, shape, dice)
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in config.patch_size]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)  # [z, y, x, 3]
    positions = offsets @ torch.tensor(matrix.T, dtype=torch.float32) + torch.tensor(centre, dtype=torch.float32)
    bend = torch.tensor(dice.normal(0, 0.5, (1, 3, 6, 4, 4)), dtype=torch.float32)
    bend = functional.interpolate(bend, size=config.patch_size, mode="trilinear", align_corners=True)
    positions = positions + bend[0].permute(1, 2, 3, 0) * (
        dice.random() * run.max_bend_mm / torch.tensor(config.spacing_mm)
    )
    scaled = positions / torch.tensor(np.maximum(shape - 1, 1) / 2, dtype=torch.float32) - 1.0
    return scaled.flip(-1)[None]  # grid_sample wants x, y, z


def _patch_centre(
    case: Case, patch: npt.NDArray[np.int_], shape: npt.NDArray[np.int_], dice: np.random.Generator
) -> FloatArray:
    """The middle of the case where it fits into the patch, else a random place on the spine."""
    spine = np.argwhere(case.classes[::2, ::2, ::2] > 0) * 2
    anchor = spine[dice.integers(len(spine))] if len(spine) else shape / 2
    free = np.maximum(shape - patch, 0) / 2
    jitter = dice.uniform(-1, 1, 3) * np.maximum(0.12 * patch, 3)
    near = np.clip(anchor, shape / 2 - free, shape / 2 + free)
    return np.asarray(near + jitter, dtype=np.float32)


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cz, cy, cx = np.cos(angles)
    sz, sy, sx = np.sin(angles)
    about_z = np.array([[1, 0, 0], [0, cz, -sz], [0, sz, cz]])
    about_y = np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    about_x = np.array([[cx, -sx, 0], [sx, cx, 0], [0, 0, 1]])
    rotation: npt.NDArray[np.float64] = about_z @ about_y @ about_x
    return rotation


def _recolour(hu: Tensor, classes: Tensor, config: SpineUNetConfig, dice: np.random.Generator) -> Tensor:
    """Change intensities so that the network cannot lean on the phantom's own grey values. Shapes [1, 1, z,
    y, x].
    """
    hu = _foreign_bone(hu, classes, config, dice)
    bone = (classes > 0) & (hu > 0)
    if dice.random() < 0.5:  # trabecular density and cortical contrast of all bone
        hu = torch.where(bone, hu * float(dice.uniform(0.6, 1.5)) + float(dice.uniform(-40, 60)), hu)
    if dice.random() < 0.5:  # how much denser a bone's shell is than its marrow, and some parts than others
        hu = torch.where(bone, hu * _shell_and_marrow(bone, dice), hu)
    if dice.random() < 0.5:  # arches and processes: mostly darker than the phantom's, whose shells are thick
        arches = _arches(bone)
        hu = torch.where(bone, hu + arches * (hu * float(dice.uniform(-0.6, 0.1)) + float(dice.uniform(-50, 20))), hu)
    if dice.random() < 0.5:  # soft tissue: slow clouds, as of organs that the phantom does not have
        soft = (hu > -150) & (classes == 0)
        hu = torch.where(soft, hu + _clouds(hu.shape, dice) * float(dice.uniform(0, 45)), hu)
    if dice.random() < 0.3:  # texture inside bone
        grain = torch.tensor(dice.normal(0, 1, (1, 1, *(max(n // 2, 1) for n in hu.shape[2:]))), dtype=torch.float32)
        grain = functional.interpolate(grain, size=hu.shape[2:], mode="trilinear", align_corners=True)
        hu = torch.where(bone, hu + grain * float(dice.uniform(0, 90)), hu)
    if dice.random() < 0.4:
        hu = _blur(hu, float(dice.uniform(0.3, 1.0)))
    if dice.random() < 0.4:  # thick slices: coarse along z, or a CT that is coarse all over, then back
        sides = dice.uniform(0.45, 1.0) if dice.random() < 0.4 else 1.0
        shares = (dice.uniform(0.35, 0.8), sides, sides)
        coarse = [max(4, int(n * share)) for n, share in zip(hu.shape[2:], shares, strict=True)]
        hu = functional.interpolate(hu, size=coarse, mode="trilinear", align_corners=True)
        hu = functional.interpolate(hu, size=config.patch_size, mode="trilinear", align_corners=True)
    if dice.random() < 0.6:
        seed = int(dice.integers(1 << 31))
        noise = torch.randn(hu.shape, generator=torch.Generator().manual_seed(seed))
        hu = hu + noise * float(dice.uniform(0, 50))
    if dice.random() < 0.5:
        hu = hu * float(dice.uniform(0.8, 1.25)) + float(dice.uniform(-30, 30))
    return hu


def _clouds(shape: Sequence[int], dice: np.random.Generator) -> Tensor:
    """Slow random variation of mean 0 and standard deviation about 1, some centimetres wide. Shape [1, 1, z, y, x]."""
    clouds = torch.tensor(dice.normal(0, 1, (1, 1, 12, 8, 8)), dtype=torch.float32)
    return functional.interpolate(clouds, size=tuple(shape[2:]), mode="trilinear", align_corners=True)


def _shell_and_marrow(bone: Tensor, dice: np.random.Generator) -> Tensor:
    """What to multiply bone by: its outer millimetres and its core each by their own number, all of it cloudily.

    The arches and processes of people are filled and shelled otherwise than the phantom's.
    """
    within = functional.avg_pool3d(bone.float(), 5, stride=1, padding=2)  # 1: only bone is near
    core = ((within - 0.7) / 0.3).clamp(0, 1)
    marrow, shell = float(dice.uniform(0.3, 1.3)), float(dice.uniform(0.6, 1.4))
    return torch.lerp(torch.full_like(core, shell), torch.full_like(core, marrow), core) * torch.exp(
        float(dice.uniform(0, 0.4)) * _clouds(bone.shape, dice)
    )


def _arches(bone: Tensor) -> Tensor:
    """How far each voxel lies outside of vertebral bodies, 0 to 1: a body is what holds a cube of bone, and a rim."""
    held = ndimage.uniform_filter(bone[0, 0].float().numpy(), 7) > 0.95
    body = ndimage.maximum_filter(held, 9).astype(np.float32)
    return 1 - torch.from_numpy(ndimage.uniform_filter(body, 5))[None, None]


def _foreign_bone(hu: Tensor, classes: Tensor, config: SpineUNetConfig, dice: np.random.Generator) -> Tensor:
    """Bright ellipsoids with a denser shell where there is no vertebra: heads of femur, contrast, stents, calcium."""
    if dice.random() < 0.4:
        return hu
    axes = [
        torch.arange(n, dtype=torch.float32) * step for n, step in zip(hu.shape[2:], config.spacing_mm, strict=True)
    ]
    background = classes == 0
    for _ in range(int(dice.integers(1, 6))):
        radii = dice.uniform(6, 32, 3)
        centre = dice.uniform(0, 1, 3) * np.array(hu.shape[2:]) * np.array(config.spacing_mm)
        squares = [((axis - float(c)) / float(r)) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)]
        distance = squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :]
        inside = (distance < 1.0)[None, None] & background & (hu > -300)
        shell = inside & (distance > float(dice.uniform(0.6, 0.95)))[None, None]
        hu = torch.where(inside, float(dice.uniform(80, 450)), hu)
        hu = torch.where(shell, float(dice.uniform(300, 1000)), hu)
    return hu


def _blur(hu: Tensor, sigma: float) -> Tensor:
    taps = torch.arange(-2, 3, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (taps / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = 5
        padding = [0, 0, 0]
        padding[axis] = 2
        hu = functional.conv3d(hu, kernel.view(shape), padding=padding)
    return hu


# --------------------------------------------------------------------------------------------------- training


def loss_of(logits: Sequence[Tensor], classes: Tensor) -> Tensor:
    """Cross entropy + soft Dice over the classes present, at every depth of the decoder (weights 1, 1/2, 1/4,
    ...).
    """
    total = torch.zeros(())
    norm = 0.0
    for depth, scores in enumerate(logits):
        weight = 0.5**depth
        target = functional.interpolate(classes[:, None].float(), size=scores.shape[2:], mode="nearest")[:, 0].long()
        scores = scores.float()
        total = total + weight * (functional.cross_entropy(scores, target) + _dice_loss(scores, target))
        norm += weight
    return total / norm


def _dice_loss(scores: Tensor, target: Tensor) -> Tensor:
    probabilities = scores.softmax(dim=1)[:, 1:]
    truth = functional.one_hot(target, scores.shape[1]).movedim(-1, 1)[:, 1:].to(probabilities.dtype)
    axes = (0, 2, 3, 4)
    overlap = (probabilities * truth).sum(axes)
    size = probabilities.sum(axes) + truth.sum(axes)
    dice = (2 * overlap + 1.0) / (size + 1.0)
    present = truth.sum(axes) > 0
    return 1 - dice[present].mean() if bool(present.any()) else scores.sum() * 0.0


def learning_rate(step: int, run: TrainingConfig) -> float:
    """Linear warm-up, then a cosine down to a hundredth."""
    if step < run.warm_up:
        return run.learning_rate * (step + 1) / run.warm_up
    done = (step - run.warm_up) / max(1, run.steps - run.warm_up)
    return run.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def batches(
    cases: Sequence[Case], config: SpineUNetConfig, run: TrainingConfig, first_step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, each a function of the seed and its step alone, so that a resumed run sees the same
    ones.
    """
    step = first_step
    while True:
        dice = np.random.default_rng((run.seed, step))
        drawn = [random_crop(cases[int(dice.integers(len(cases)))], config, run, dice) for _ in range(run.batch)]
        yield torch.stack([patch for patch, _ in drawn]), torch.stack([classes for _, classes in drawn])
        step += 1


def train(
    config: SpineUNetConfig,
    cases: Sequence[Case],
    out: Path,
    run: TrainingConfig,
    *,
    save_every: int,
    state: Path | None,
    start_from: Path | None = None,
) -> dict[str, Tensor]:
    """Train one network and write it into the package `out`; `state` holds what a resumed run needs, `start_from`
    is a weights folder whose network is trained on.
    """
    torch.manual_seed(run.seed)
    network = build(config, deep_supervision=True)
    if start_from is not None:
        network.load_state_dict(stored_weights(start_from / config.folder))
    network = network.to(memory_format=torch.channels_last_3d)
    optimiser = torch.optim.AdamW(network.parameters(), lr=run.learning_rate, weight_decay=1e-4)
    average = {name: value.detach().clone() for name, value in network.named_parameters()}
    first = 0
    if state is not None and state.exists():
        stored = torch.load(state, weights_only=True)
        network.load_state_dict(stored["network"])
        optimiser.load_state_dict(stored["optimiser"])
        average, first = stored["average"], stored["step"]
    seen = 0.0
    started = time.monotonic()
    for step, (patches, classes) in zip(range(first, run.steps), batches(cases, config, run, first), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, run)
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
            logits = network(patches.to(memory_format=torch.channels_last_3d))
        loss = loss_of(logits, classes)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimiser.step()
        _update_average(average, network, min(run.average, (step + 1) / (step + 10)))
        seen = loss.item() if step == first else 0.98 * seen + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            print(f"{config.dataset} step {step + 1}/{run.steps} loss {seen:.3f} {pace:.2f} s/step", flush=True)
        if (step + 1) % save_every == 0 or step + 1 == run.steps:
            averaged = averaged_weights(network, average)
            write_network(config, averaged, out, training_cases=len(cases))
            write_sums(out)
            if state is not None:
                torch.save(
                    {
                        "network": network.state_dict(),
                        "optimiser": optimiser.state_dict(),
                        "average": average,
                        "step": step + 1,
                    },
                    state,
                )
    return averaged_weights(network, average)


def stored_weights(folder: Path) -> Mapping[str, Tensor]:
    """The float32 weights of a network that `write_network` wrote."""
    checkpoint = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    return {name: value.float() for name, value in checkpoint["network_weights"].items()}


def _update_average(average: Mapping[str, Tensor], network: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for name, value in network.named_parameters():
            average[name].lerp_(value, 1 - decay)


def averaged_weights(network: nn.Module, average: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's state dict with the averaged weights in every one of its aliases."""
    by_storage = {value.data_ptr(): average[name] for name, value in network.named_parameters()}
    return {name: by_storage[value.data_ptr()] for name, value in network.state_dict().items()}


# ------------------------------------------------------------------------------------------- digital patients


def prepare_case(seed: int) -> dict[str, npt.NDArray[np.generic]]:
    """Render one digital patient at a scanner's resolution and resample it for both networks, as prediction
    would.
    """
    dice = np.random.default_rng((seed, 7))
    settings: dict[str, str | float] = {
        "contrast_phase": str(dice.choice(["native", "arterial", "portal"], p=[0.7, 0.1, 0.2])),
        "kvp": int(dice.choice([100, 120, 140], p=[0.15, 0.7, 0.15])),
    }
    if dice.random() < 0.35:
        settings["bmd_g_cm2"] = float(dice.uniform(0.5, 1.6))
    if dice.random() < 0.25:
        settings["cobb_deg"] = float(dice.uniform(-30, 30))
    if dice.random() < 0.2:
        settings["fracture"] = f"{dice.choice(['T12', 'L1', 'L2', 'L3', 'L4'])}:{int(dice.integers(15, 50))}"
    elif dice.random() < 0.06:
        settings["metal"] = str(dice.choice(["L2", "L3", "L4", "L5"]))
    patient = draw(seed, **settings)
    grid = _scanner_grid(body_grid(patient, 2.0, first="T10", last="S1", margin_mm=0.0), dice)
    rendered = render(patient, grid)
    hu = torch.from_numpy(scan(rendered, patient, scanner_rng(patient)).astype(np.float32))
    case: dict[str, npt.NDArray[np.generic]] = {}
    for name, config in NETWORKS.items():
        small = _to_network_axes(resample(hu, grid.spacing_kji_mm, config.spacing_mm).numpy())
        classes = _to_network_axes(_resample_labels(class_indices(rendered.labels, config), small.shape))
        box = _spine_box(classes, config) if name == "fine" else (slice(None),) * 3
        case[f"{name}_hu"] = small[box].round().astype(np.int16)
        case[f"{name}_classes"] = classes[box]
    return case


def _scanner_grid(body: Grid, dice: np.random.Generator) -> Grid:
    """The body's box in a scanner's voxels, with more or less air around it; it ends inside T10, above which
    there is no spine.
    """
    x, y, z = body.origin_lps
    length, depth, width = (n * step for n, step in zip(body.shape_kji, body.spacing_kji_mm, strict=True))
    side = dice.uniform(0, 50, 4)
    step = (float(dice.uniform(1.5, 3.0)), *(float(dice.uniform(0.9, 1.4)),) * 2)
    low = (x - side[0], y - side[1] / 2, z - float(dice.uniform(0, 25)))
    high = (x + width + side[2], y + depth + side[3] / 2, z + length - float(dice.uniform(3, 14)))
    return Grid.covering(low, high, step)


def _to_network_axes(array: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
    """[k, j, i] of a digital patient (up, back, left) -> [z, y, x] (up, front, right)."""
    return np.ascontiguousarray(array[:, ::-1, ::-1])


def _resample_labels(classes: LabelArray, shape: Sequence[int]) -> LabelArray:
    """The class with the largest share of each new voxel: one class at a time, trilinear with aligned
    corners.
    """
    best = torch.full(tuple(shape), 0.0)
    result = torch.zeros(tuple(shape), dtype=torch.uint8)
    for index in np.unique(classes):
        share = functional.interpolate(
            torch.from_numpy((classes == index).astype(np.float32))[None, None],
            size=tuple(shape), mode="trilinear", align_corners=True,
        )[0, 0]  # fmt: skip
        wins = share > best
        best = torch.where(wins, share, best)
        result[wins] = int(index)
    labels: LabelArray = result.numpy()
    return labels


def _spine_box(classes: LabelArray, config: SpineUNetConfig) -> tuple[slice, ...]:
    """The spine with a margin in the axial plane, the whole height along it."""
    box = [slice(None)]
    for axis in (1, 2):
        margin = int(MARGIN_MM / config.spacing_mm[axis])
        where = np.flatnonzero((classes > 1).any(axis=(0, 3 - axis)))  # by the free vertebrae and S1
        box.append(slice(max(0, int(where[0]) - margin), int(where[-1]) + 1 + margin))
    return tuple(box)


def prepare(out: Path, *, patients: int, first_seed: int) -> None:
    """Render `patients` digital patients into `out`, one file each; patients that are there are kept."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(first_seed, first_seed + patients):
        path = out / f"{seed:06d}.npz"
        if path.exists():
            continue
        case = prepare_case(seed)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as stream:
            np.savez(stream, **case)  # type: ignore[arg-type]
        unfinished.rename(path)
        if (seed - first_seed + 1) % 20 == 0:
            print(f"{seed - first_seed + 1} of {patients} patients", flush=True)


# ----------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """`prepare` or `train`; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m models.spine_training", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    rendering = commands.add_parser("prepare", help="render digital patients once")
    rendering.add_argument("--out", type=Path, required=True)
    rendering.add_argument("--patients", type=int, default=160)
    rendering.add_argument("--first-seed", type=int, default=1)
    training = commands.add_parser("train", help="train one network")
    training.add_argument("--network", choices=sorted(NETWORKS), required=True)
    training.add_argument("--cases", type=Path, required=True)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=2000)
    training.add_argument("--batch", type=int, default=1)
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--save-every", type=int, default=250)
    training.add_argument("--state", type=Path, help="a file that a stopped run resumes from")
    training.add_argument("--start-from", type=Path, help="a weights folder whose network is trained on")
    training.add_argument("--learning-rate", type=float, default=TrainingConfig.learning_rate)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.command == "prepare":
        prepare(given.out, patients=given.patients, first_seed=given.first_seed)
        return
    run = TrainingConfig(steps=given.steps, batch=given.batch, seed=given.seed, learning_rate=given.learning_rate)
    cases = load_cases(given.cases, given.network)
    print(
        json.dumps({"network": given.network, "cases": len(cases), "steps": run.steps, "batch": run.batch}),
        flush=True,
    )
    config = NETWORKS[given.network]
    train(config, cases, given.out, run, save_every=given.save_every, state=given.state, start_from=given.start_from)


if __name__ == "__main__":
    main()

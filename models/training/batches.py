"""Batches of augmented pictures.

Every batch draws from its own generator, seeded by run, network, epoch and place, so that a run can be taken up
again before any batch.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from models.crop import OUTSIDE_HU
from models.inputs import central_field, windowed
from models.resnet50 import Floats
from models.training.cohort import Cohort, Ints
from models.training.configuration import MemberPlan, TrainingConfig


def training_images(cohort: Cohort, plan: MemberPlan, config: TrainingConfig) -> Ints:
    """[images, 2]: the vertebra, and by how many slabs its picture lies off the middle one.

    Yoshida 2023: 280 patients x 4 vertebrae x 3 slabs = 3360 images train; the middle slab alone validates.
    """
    reach = config.slab_images // 2
    vertebrae = cohort.where(plan.training)
    offsets = np.arange(-reach, reach + 1)
    return np.stack([np.repeat(vertebrae, len(offsets)), np.tile(offsets, len(vertebrae))], axis=1)


def steps_per_epoch(images: int, config: TrainingConfig) -> int:
    """Whole batches only; an epoch of fewer images than one batch is one batch of them all."""
    return max(1, images // config.batch)


def batches(
    cohort: Cohort, plan: MemberPlan, config: TrainingConfig, epoch: int, first: int = 0
) -> Iterator[tuple[Floats, Floats]]:
    """One epoch of (pictures [b, channels, rows, columns], targets [b, 2]), from batch `first` on."""
    images = training_images(cohort, plan, config)
    order = np.random.default_rng([config.seed, plan.index, epoch]).permutation(images)
    size = min(config.batch, len(order))
    for number in range(first, steps_per_epoch(len(order), config)):
        draw = np.random.default_rng([config.seed, plan.index, epoch, number])
        vertebrae, offsets = order[number * size : (number + 1) * size].T
        variants = draw.integers(cohort.slabs.shape[1], size=size)
        slabs = seen_slabs(cohort.slabs[vertebrae, variants], offsets, config)
        yield augmented(slabs, config, draw), cohort.targets[vertebrae]


def seen_slabs(slabs: npt.NDArray[np.int16], offsets: Ints, config: TrainingConfig) -> npt.NDArray[np.int16]:
    """[b, slabs, size, size] -> [b, seen, size, size]: one slab, so far off the middle, or the middle ones."""
    middle, reach = slabs.shape[1] // 2, config.input.slabs // 2
    if reach:
        return slabs[:, middle - reach : middle + reach + 1]
    one: npt.NDArray[np.int16] = slabs[np.arange(len(slabs)), middle + offsets]
    return one[:, None]


def augmented(slabs: npt.NDArray[np.int16], config: TrainingConfig, draw: np.random.Generator) -> Floats:
    """Slabs [b, seen, size, size] HU -> pictures [b, channels, rows, columns].

    Shifted, sides exchanged, mask eroded, HU disturbed; a single slab is in all three channels.
    """
    field_hu = central_field(slabs, config.input).astype(np.float32)
    for image in field_hu:  # [seen, rows, columns]
        down, back = draw.integers(-config.shift_px, config.shift_px + 1, size=2)
        image[:] = _moved(image, int(down), int(back))
        if draw.random() < 0.5:
            image[:] = image[::-1].copy()  # left for right: the vertebra is symmetric
        if draw.random() < config.erode_share:
            image[:] = _eroded(image)
    outside = field_hu <= OUTSIDE_HU
    count = (len(field_hu), 1, 1, 1)
    noise = draw.random(count) * config.noise_hu * draw.standard_normal(field_hu.shape, dtype=np.float32)
    disturbed = field_hu + draw.standard_normal(count) * config.offset_hu + noise
    pictures = windowed(np.where(outside, OUTSIDE_HU, disturbed), config.input)
    return np.repeat(pictures, config.input.channels // pictures.shape[1], axis=1)


def _moved(image: Floats, down: int, back: int) -> Floats:
    """Shifted by whole pixels; what comes in is outside."""
    moved = np.full_like(image, OUTSIDE_HU)
    rows, columns = image.shape[-2:]
    moved[..., max(0, down) : rows + min(0, down), max(0, back) : columns + min(0, back)] = image[
        ..., max(0, -down) : rows + min(0, -down), max(0, -back) : columns + min(0, -back)
    ]
    return moved


def _eroded(image: Floats) -> Floats:
    """Without the outermost pixel of its mask, as a tight segmentation would have it."""
    inside = image > OUTSIDE_HU
    kept = inside.copy()
    kept[..., 1:, :] &= inside[..., :-1, :]
    kept[..., :-1, :] &= inside[..., 1:, :]
    kept[..., :, 1:] &= inside[..., :, :-1]
    kept[..., :, :-1] &= inside[..., :, 1:]
    return np.where(kept, image, np.float32(OUTSIDE_HU))

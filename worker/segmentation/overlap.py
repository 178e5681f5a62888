"""How far the network believes its own outlines: what it hands out of its scores before they become names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 16  # planes at a time: memory stays that of a few planes of every class
BACKGROUND = 0  # its class


def expected_overlaps(logits: Tensor, label_ids: Mapping[int, int], timidity: float = 0.0) -> dict[int, float]:
    """The Dice that each outline has by the network's own probabilities.

    Of the sums in 2 |A and B| / (|A| + |B|), |A| is counted, and those with the truth B are expected: a voxel is in B
    with the probability that the network gives it. A rim that it half believes in costs, inside of the outline and
    outside of it.

    Args:
        logits: [classes, z, y, x] at the network's own spacing; any order of the axes will do.
        label_ids: the network's class -> label id.
        timidity: what is taken off the background's logit before the highest one names a voxel.

    Returns:
        Label id -> expected Dice, 0 to 1; none for a class that won nowhere.
    """
    classes = logits.shape[0]
    outlined, agreed, expected = (torch.zeros(classes, dtype=torch.float64) for _ in range(3))
    for part in torch.split(logits, CHUNK, dim=1):
        scores = part.float()
        believed = torch.softmax(scores, dim=0)
        expected += believed.sum(dim=(1, 2, 3)).double().cpu()
        bold = scores.clone()
        bold[BACKGROUND] -= timidity
        winner = bold.argmax(dim=0)
        won = torch.gather(believed, 0, winner[None])[0].flatten().double().cpu()
        names = winner.flatten().cpu()
        agreed += torch.bincount(names, won, minlength=classes)
        outlined += torch.bincount(names, minlength=classes)
    overlap = 2 * agreed / (outlined + expected)
    return {label: float(overlap[index]) for index, label in label_ids.items() if outlined[index] > 0}

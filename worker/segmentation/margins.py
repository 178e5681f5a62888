"""How clearly the network decided, level by level: what it hands out of its scores before they become names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CHUNK = 16  # planes at a time: memory stays that of a few planes of every class


def label_margins(logits: Tensor, label_ids: Mapping[int, int]) -> dict[int, float]:
    """The mean lead of the winning class over the next one, where it won.

    Args:
        logits: [classes, z, y, x] at the network's own spacing; any order of the axes will do.
        label_ids: the network's class -> label id.

    Returns:
        Label id -> mean of (highest - second highest probability) over its voxels, 0 to 1; none for a class that won
        nowhere.
    """
    total = torch.zeros(logits.shape[0], dtype=torch.float64)
    count = torch.zeros(logits.shape[0], dtype=torch.float64)
    for part in torch.split(logits, CHUNK, dim=1):
        scores = part.float()
        best, names = torch.topk(scores, 2, dim=0)
        lead = torch.exp(best - torch.logsumexp(scores, dim=0))
        winner = names[0].flatten().cpu()
        total += torch.bincount(winner, (lead[0] - lead[1]).flatten().double().cpu(), minlength=len(total))
        count += torch.bincount(winner, minlength=len(total))
    return {label: float(total[index] / count[index]) for index, label in label_ids.items() if count[index] > 0}

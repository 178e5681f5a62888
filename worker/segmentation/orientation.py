"""Turning arrays between the CT's own axes and the axes that nnU-Net was trained in; no resampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform

# TotalSegmentator brings every CT to the closest canonical (RAS) axes; nnU-Net's reader then gives [z, y, x]:
# z to the head, y to the front, x to the right. In LPS: axis 2 forward, axis 1 backward, axis 0 backward.
_CANONICAL = np.array([[2, 1], [1, -1], [0, -1]], dtype=np.float64)


@dataclass(frozen=True)
class Turn:
    """How a volume's axes are permuted and flipped to the network's, and back."""

    forward: npt.NDArray[np.float64]
    backward: npt.NDArray[np.float64]

    @classmethod
    def of(cls, affine: npt.NDArray[np.float64]) -> Turn:
        """The turn for a volume whose affine maps (k, j, i, 1) to LPS mm."""
        own = io_orientation(affine)
        return cls(ornt_transform(own, _CANONICAL), ornt_transform(_CANONICAL, own))

    def to_network(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[k, j, i] -> [z, y, x]."""
        return np.ascontiguousarray(apply_orientation(array, self.forward))

    def to_volume(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[z, y, x] -> [k, j, i]."""
        return np.ascontiguousarray(apply_orientation(array, self.backward))

    def tensor_to_network(self, tensor: torch.Tensor) -> torch.Tensor:
        """[k, j, i] -> [z, y, x], on whatever device it is."""
        flipped = [axis for axis, direction in enumerate(self.forward[:, 1]) if direction < 0]
        return tensor.flip(flipped).permute(self._order).contiguous()

    def shape_to_network(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """How many voxels [k, j, i] are along [z, y, x]."""
        z, y, x = (shape[axis] for axis in self._order)
        return z, y, x

    def spacing_to_volume(self, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """A spacing along [z, y, x] -> along [k, j, i]."""
        k, j, i = (spacing_mm[int(axis)] for axis in np.argsort(self._order))
        return k, j, i

    @property
    def _order(self) -> tuple[int, ...]:
        return tuple(int(axis) for axis in np.argsort(self.forward[:, 0]))

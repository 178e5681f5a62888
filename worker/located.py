"""The vertebrae of one label map, each located once: findings and crop ask for the same ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from models.crop import Vertebra, VertebraError, locate


@dataclass(frozen=True)
class Located:
    """Answers as `models.crop.locate` does; what it has said once it says again, a refusal too."""

    labels: npt.NDArray[np.uint8]  # [k, j, i]; not to be changed meanwhile
    affine: npt.NDArray[np.float64]
    _known: dict[int, Vertebra | VertebraError] = field(default_factory=dict)

    def vertebra(self, label_id: int) -> Vertebra:
        """The vertebra of this label.

        Raises:
            VertebraError: there is none, or nothing that could be one.
        """
        if label_id not in self._known:
            try:
                self._known[label_id] = locate(self.labels, self.affine, label_id)
            except VertebraError as error:
                self._known[label_id] = error
        found = self._known[label_id]
        if isinstance(found, VertebraError):
            raise VertebraError(*found.args)
        return found

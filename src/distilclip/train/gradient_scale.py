"""Scale the gradients that go through fp16 towers, so that small ones are not rounded to zero."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

BACKOFF, GROWTH = 0.5, 2.0
GROWTH_INTERVAL = 2000
"""As in torch.amp.GradScaler, whose own class steps an optimizer; here the loop decides, with the norm that it has."""


@dataclass(kw_only=True)
class GradientScale:
    """The factor of the towers' gradients: halved after a step that overflows, doubled after many that do not.

    Only powers of two, so that scaling and unscaling change no bit of what fits.
    """

    value: float = 2.0**16
    num_good: int = 0
    """steps without overflow since the value last changed"""

    def grow(self) -> None:
        """Count a step without overflow."""
        self.num_good += 1
        if self.num_good == GROWTH_INTERVAL:
            self.value, self.num_good = self.value * GROWTH, 0

    def lower(self) -> bool:
        """Halve after an overflow, whose step is left out; False where the value is 1, so that scaling is no cause."""
        if self.value <= 1:
            return False
        self.value, self.num_good = self.value * BACKOFF, 0
        return True

    def state(self) -> dict[str, Any]:
        """Return the fields, for a checkpoint."""
        return asdict(self)

"""State how centers are fitted, as one checked value. Imports neither torch nor numpy."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

from distilclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """Options of a fit of centers.

    Raises:
        InputError: a number that is not whole, too small, or a tolerance outside of 0 to 1.
    """

    num_centers: int
    """number of clusters (the paper: 1,000,000 for 225 M images)"""
    num_iterations: int = 20
    """largest number of rounds of assignment and update"""
    tolerance: float = 0.0
    """stop when a round lowers the objective by less than this share of it (default: when nothing changes)"""
    points_per_center: int | None = None
    """fit on a sample of this many rows per center (default: all); every row gets its label at the end"""
    seed: int = 0
    """seed of the sample and of the first centers"""

    def __post_init__(self) -> None:
        for name, least in (("num_centers", 1), ("num_iterations", 1), ("points_per_center", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name == "points_per_center":
                continue
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}.")
        if not (isinstance(self.tolerance, numbers.Real) and 0 <= self.tolerance < 1):
            raise InputError(f"tolerance is {self.tolerance!r}; it must be at least 0 and less than 1.")

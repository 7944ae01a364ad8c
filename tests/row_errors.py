"""How far results of operations on rows may be from the reference, in units of the computed type's roundoff."""

from __future__ import annotations

from typing import Any

import torch
from operation_checks import OperationChecks
from torch import Tensor

SUMMED_ROWS = 64
"""That the engine adds up in the type that is computed in."""


def of_sum(columns: int) -> float:
    """Of a sum over a row, relative to the sum of its terms' sizes: blocks of 1024 elements, each in 64 parts or more
    on the tier with the widest vectors; the margin of 8 covers the others' 16."""
    return 4 + min(columns, 1024) / 64 + columns / 1024


def of_rows(rows: int) -> float:
    """Of a sum over rows: one rounding for each of those that are added up in the type that is computed in, less the
    margin of 8."""
    return min(rows, SUMMED_ROWS) / 8 + 1


class RowChecks(OperationChecks):
    dtype: torch.dtype
    """Of the call that is compared."""

    def compare(self, variant: str, call: dict[str, Any]) -> None:
        self.dtype = call["x"].dtype
        super().compare(variant, call)

    @property
    def roundoff(self) -> float:
        """Of the computed type."""
        return torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).eps / 2

    @property
    def rounding(self) -> float:
        """Of a number that is kept in the call's dtype, in units of the computed type's."""
        return torch.finfo(self.dtype).eps / 2 / self.roundoff

    @property
    def subnormal(self) -> float:
        """As `rounding`, of a number near 0."""
        own = torch.finfo(self.dtype)
        return own.smallest_normal * own.eps / 2 / self.roundoff


def over_rows(terms: Tensor, column: Tensor) -> Tensor:
    """Summed to the shape of a tensor of the last dimensions."""
    return terms.sum_to_size(column.shape)

"""What every backend declares and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor

from heedful.problem import FEATURES, Attention, Call, Problem

# Runs calls of one shape and kind on q, k and v in index order (B, H, L, D), and the pattern's operands; where bias,
# alibi_slopes or sinks was given, on these three too, as a `Call` has them.
Shortcut = Callable[..., Tensor | Attention]


class Backend(ABC):
    """One way to run attention; a class attribute per capability, so that support is declared and not tried out."""

    name: ClassVar[str]
    devices: ClassVar[frozenset[str] | None]
    """Device types; None takes any."""
    dtypes: ClassVar[frozenset[torch.dtype]]
    max_head_dim: ClassVar[int | None]
    """The largest head and value dim; None takes any."""
    features: ClassVar[frozenset[str]]
    """Names out of `heedful.problem.FEATURES`, save "gradient"."""
    gradient: ClassVar[bool]

    def available(self) -> str | None:
        """None where the backend can run in this process, otherwise why it cannot."""
        return None

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        """Why this problem cannot run here, one sentence part each; empty where it can."""
        reasons = []
        if self.devices is not None and problem.device_type not in self.devices:
            reasons.append(f"takes {_listed(self.devices)} tensors, not {problem.device_type}")
        if problem.dtype not in self.dtypes:
            reasons.append(f"takes {_listed(_name(dtype) for dtype in self.dtypes)}, not {_name(problem.dtype)}")
        if self.max_head_dim is not None:
            for what, size in (("head dim", problem.head_dim), ("value dim", problem.value_dim)):
                if size > self.max_head_dim:
                    reasons.append(f"takes a {what} up to {self.max_head_dim}, not {size}")
        supported = self.features | {"gradient"} if self.gradient else self.features
        reasons += [f"does not support {FEATURES[name]}" for name in FEATURES if name in problem.features - supported]
        return reasons

    def on_request_only(self, problem: Problem) -> bool:
        """Whether this problem runs here only where the caller names this backend."""
        return False

    def notes(self, problem: Problem) -> list[str]:
        """What a user should know about how the problem would run here."""
        return []

    @abstractmethod
    def run(self, call: Call) -> Attention:
        """Compute a call whose problem is supported; lse and weights are None unless the problem needs them."""

    def shortcut(self, call: Call) -> Shortcut | None:
        """A function for further calls that differ from this one in tensor contents and strides alone.

        It must refuse, by any exception, k and v of another dtype than q, which it may be given. None where there is
        none, as for calls with pages.
        """
        return None

    def forget(self) -> None:
        """Free what is kept between calls."""
        return


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))

"""What all components share: a level, and the functions that it brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heedful.errors import unsupported, wrong_value
from heedful.levels.ladder import NAMES, Level, interpreting, load, loaded
from heedful.levels.operations import Operations


class Component(nn.Module):
    """Base of the components. Made at level 1 by its class; `create` and `convert` put it on another."""

    component: ClassVar[str]
    attends: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._level: Level = 1
        self._is_unit = False
        load(1)

    @property
    def level(self) -> Level:
        """1 to 5, or "torch"."""
        return self._level

    def put_on(self, level: Level) -> None:
        """Compute with another level's functions from now on; uncompiled, until `compile_graph`."""
        self._level = level
        self._is_unit = False
        self.__dict__.pop("forward", None)

    def units(self) -> Iterator[Component]:
        """The modules that become a graph each where this one is compiled."""
        yield self

    def compile_graph(self) -> None:
        """Compile this module as one graph, when it is first called."""
        from heedful.levels.level_3_compile import OPTIONS

        self._is_unit = True
        # In place of the method, so that hooks and state stay what they are.
        bound = type(self).forward.__get__(self)
        self.__dict__["forward"] = torch.compile(bound, fullgraph=True, options=dict(OPTIONS))

    def flops(self, *shapes: tuple[int, ...]) -> tuple[float, float]:
        """Floating-point operations that forward and backward need for inputs of these shapes, without what a causal
        mask hides. Matrix products alone count."""
        return 0.0, 0.0

    def extra_repr(self) -> str:
        return f"level={self._level!r}"

    def _operations(self, x: Tensor) -> Operations:
        """The level's functions.

        Raises:
            UnsupportedError: the level does not run on x's device.
        """
        if (self._level == 5 and not x.is_cpu) or (self._level == 4 and x.is_cpu and not interpreting()):
            raise unsupported(
                f"level {self._level} ({NAMES[self._level]}) does not run on {x.device}: "
                f"heedful.levels.available({self._level}, device={x.device.type!r}) says why",
                {},
            )
        return loaded[self._level]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("forward", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        load(self._level)
        # Compiled code is not copied or pickled with a module.
        if self._is_unit:
            self.compile_graph()


def attention_flops(q_shape: tuple[int, ...], k_length: int, causal: bool) -> tuple[float, float]:
    """Operations of attention over the pairs that count, forward and backward."""
    batch, heads, q_length, head_dim = q_shape
    pairs = q_length * k_length
    if causal:
        pairs -= q_length * (q_length - 1) // 2
    forward = 4.0 * batch * heads * head_dim * pairs
    return forward, 2.5 * forward


def check_width(x: Tensor, dim: int) -> None:
    """Refuses an input whose last dimension is another."""
    if x.dim() < 1 or x.shape[-1] != dim:
        raise wrong_value("x", f"shape {tuple(x.shape)}", f"(..., {dim})")


def projection_flops(module: nn.Module, tokens: int) -> float:
    """Operations of the linear layers in a module, each applied to every token once."""
    return 2.0 * tokens * sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))

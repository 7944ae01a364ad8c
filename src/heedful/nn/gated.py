"""`SwiGLU`, `GEGLU` and `GatedMLP`: gated activations, and the feed-forward block around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from heedful.errors import wrong_value
from heedful.ops import geglu, swiglu
from heedful.patterns.arguments import integer


class SwiGLU(nn.Module):
    """silu(gate)·up, as `heedful.ops.swiglu` computes it. It has no parameters; `GatedMLP` has projections around it.

    Args:
        gate_first: of an input that holds both halves, whether the first is the gate.
    """

    def __init__(self, *, gate_first: bool = True) -> None:
        super().__init__()
        self.gate_first = gate_first

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """As gate; without up gate is (..., 2 n), both halves, and the result (..., n)."""
        return swiglu(gate, up, gate_first=up is not None or self.gate_first)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return "" if self.gate_first else "gate_first=False"


class GEGLU(nn.Module):
    """gelu(gate)·up, as `heedful.ops.geglu` computes it. It has no parameters; `GatedMLP` has projections around it.

    Args:
        approximate: "none", or "tanh" for GELU's approximation.
        gate_first: of an input that holds both halves, whether the first is the gate.

    Raises:
        ValueError: approximate is neither.
    """

    def __init__(self, approximate: str = "none", *, gate_first: bool = True) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise wrong_value("approximate", repr(approximate), "'none' or 'tanh'")
        self.approximate, self.gate_first = approximate, gate_first

    def forward(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """As gate; without up gate is (..., 2 n), both halves, and the result (..., n)."""
        return geglu(gate, up, approximate=self.approximate, gate_first=up is not None or self.gate_first)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        shown = [] if self.approximate == "none" else [f"approximate={self.approximate!r}"]
        return ", ".join(shown if self.gate_first else [*shown, "gate_first=False"])


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": SwiGLU,
    "gelu": GEGLU,
    "gelu_tanh": lambda: GEGLU("tanh"),
}


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x))·up_proj(x)), the feed-forward block of Llama, Mistral, Qwen2 and Gemma; their
    MLPs' state_dicts load.

    Args:
        hidden_size: of the input and output.
        intermediate_size: between the projections.
        activation: "silu", "gelu" or "gelu_tanh".
        bias: whether the projections have one.

    Raises:
        ValueError: activation is none of these, or a size is below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "silu",
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise wrong_value("activation", repr(activation), "'silu', 'gelu' or 'gelu_tanh'")
        outer, inner = integer("hidden_size", hidden_size, 1), integer("intermediate_size", intermediate_size, 1)
        self.gate_proj = nn.Linear(outer, inner, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(outer, inner, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(inner, outer, bias=bias, device=device, dtype=dtype)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) to the same."""
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))
        return out

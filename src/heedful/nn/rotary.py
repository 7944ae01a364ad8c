"""`RotaryEmbedding`: positions as rotations of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heedful.arguments import LAYOUTS
from heedful.errors import wrong_type, wrong_value
from heedful.ops import rope
from heedful.patterns.arguments import integer, readable

SCALINGS = (None, "linear", "dynamic")


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features of queries and keys by angles that grow with their position.

    Pair i of position p turns by p · base^(-2i / rotary_dim), in float32 whatever the inputs' dtype. Cosines and sines
    are kept between calls; they are neither in the state_dict nor cast by `module.to(dtype)`.

    Args:
        head_dim: size of each head.
        base: the constant above; Hugging Face's rope_theta.
        rotary_dim: how many features are rotated, from the first on, even; None is all. The others stay.
        interleaved: whether a pair is (x[2i], x[2i + 1]), as in GPT-J, instead of (x[i], x[i + rotary_dim / 2]), as in
            Llama and GPT-NeoX.
        scaling: None; "linear" divides positions by `factor`; "dynamic" raises the base where a call's last position
            passes `original_length`, to base · (factor · length / original_length - factor + 1)^(n / (n - 2)) with
            n = rotary_dim.
        factor: of the scaling, at least 1.
        original_length: for "dynamic": the length that the model was trained with.
        layout: "bhld" for (B, H, L, D) inputs, "blhd" for (B, L, H, D).

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: str | None = None,
        factor: float = 1.0,
        original_length: int | None = None,
        layout: str = "bhld",
    ) -> None:
        super().__init__()
        self.head_dim = integer("head_dim", head_dim, 1)
        self.rotary_dim = self.head_dim if rotary_dim is None else integer("rotary_dim", rotary_dim, 2, self.head_dim)
        if self.rotary_dim % 2:
            raise wrong_value("head_dim" if rotary_dim is None else "rotary_dim", self.rotary_dim, "an even number")
        if not base > 0:
            raise wrong_value("base", base, "a positive number")
        if scaling not in SCALINGS:
            raise wrong_value("scaling", repr(scaling), "None, 'linear' or 'dynamic'")
        if not factor >= 1 or (scaling is None and factor != 1):
            raise wrong_value("factor", factor, "1 without scaling" if scaling is None else "a number of at least 1")
        if (scaling == "dynamic") != (original_length is not None):
            raise wrong_value("original_length", original_length, "an int with scaling='dynamic', otherwise None")
        if scaling == "dynamic" and self.rotary_dim < 4:
            raise wrong_value("rotary_dim", self.rotary_dim, "at least 4 with scaling='dynamic'")
        if layout not in LAYOUTS:
            raise wrong_value("layout", repr(layout), "'bhld' or 'blhd'")
        self.base = float(base)
        self.interleaved = interleaved
        self.scaling = scaling
        self.factor = float(factor)
        self.original_length = None if original_length is None else integer("original_length", original_length, 1)
        self.layout = layout
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None = None, *, offset: int | Tensor = 0
    ) -> tuple[Tensor, Tensor]:
        """q and k, rotated.

        Args:
            q: (B, H, L, D), or (B, L, H, D) with layout="blhd".
            k: the same with heads of its own number.
            position_ids: (L,) or (B, L), ints; None is 0, 1, 2, ...
            offset: added to every position: an int, or an int tensor of one element or one per batch item, such as the
                number of tokens in a cache.

        Raises:
            TypeError, ValueError: an argument is of another shape or dtype.
        """
        axis = 2 if self.layout == "bhld" else 1
        for name, tensor in (("q", q), ("k", k)):
            if tensor.dim() != 4 or tensor.shape[-1] != self.head_dim:
                axes = "(B, H, L, D)" if axis == 2 else "(B, L, H, D)"
                raise wrong_value(name, f"shape {tuple(tensor.shape)}", f"{axes} with D = {self.head_dim}")
        length = q.shape[axis]
        if k.shape[axis] != length:
            raise wrong_value("k", f"length {k.shape[axis]}", f"q's length, {length}; rotate keys before caching them")
        positions = self._positions(position_ids, offset, q.shape[0], length)
        cos, sin, rows = self._angles(positions, offset, length, q.device)
        interleaved, layout = self.interleaved, self.layout
        return (
            rope(q, cos, sin, positions=rows, interleaved=interleaved, layout=layout),
            rope(k, cos, sin, positions=rows, interleaved=interleaved, layout=layout),
        )

    def extra_repr(self) -> str:
        shown = [f"{self.head_dim}", f"base={self.base:g}"]
        if self.rotary_dim != self.head_dim:
            shown.append(f"rotary_dim={self.rotary_dim}")
        if self.interleaved:
            shown.append("interleaved=True")
        if self.scaling is not None:
            shown.append(f"scaling={self.scaling!r}, factor={self.factor:g}")
        return ", ".join(shown)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_tables": {}}

    def _positions(self, position_ids: Tensor | None, offset: int | Tensor, batch: int, length: int) -> Tensor | None:
        """(L,) or (B or 1, L), the offset included; None for those from an int offset on."""
        if isinstance(offset, Tensor):
            if offset.is_floating_point() or offset.numel() not in (1, batch):
                raise wrong_value("offset", f"{offset.dtype} {tuple(offset.shape)}", f"ints, 1 or {batch} of them")
            offset = offset.reshape(-1, 1)
        elif not torch.compiler.is_compiling():
            integer("offset", offset, 0)
        if position_ids is None:
            if not isinstance(offset, Tensor):
                return None
            return torch.arange(length, device=offset.device) + offset
        if not isinstance(position_ids, Tensor) or position_ids.is_floating_point():
            got = position_ids.dtype if isinstance(position_ids, Tensor) else type(position_ids).__name__
            raise wrong_type("position_ids", got, "an int tensor")
        if position_ids.shape not in ((length,), (1, length), (batch, length)):
            raise wrong_value(
                "position_ids", f"shape {tuple(position_ids.shape)}", f"({length},) or ({batch}, {length})"
            )
        return position_ids + offset

    def _angles(
        self, positions: Tensor | None, offset: int | Tensor, length: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cosines and sines, float32 (L, rotary_dim / 2) or (B, L, rotary_dim / 2); or tables and the rows of them."""
        if positions is None:
            assert not isinstance(offset, Tensor)
            end = offset + length
            if torch.compiler.is_compiling() or self._is_raised(end):
                return *self._compute(torch.arange(offset, end, device=device), end), None
            cos, sin = self._table(end, device)
            return cos[offset:end], sin[offset:end], None
        positions = positions.to(device)
        if not readable(positions):
            return *self._compute(positions, positions.max() + 1), None
        end = int(positions.max()) + 1 if positions.numel() else 0
        if self._is_raised(end):
            return *self._compute(positions, end), None
        return *self._table(end, device), positions.long()

    def _is_raised(self, end: int) -> bool:
        """Whether dynamic scaling changes the base for this length, so that a table would serve no other."""
        return self.original_length is not None and end > self.original_length

    def _table(self, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least the positions below `end`."""
        table = self._tables.get(device)
        if table is None or table[0].shape[0] < end:
            size = max(256, 1 << (end - 1).bit_length())
            if self.original_length is not None:
                size = min(size, self.original_length)
            # A table that was made under inference_mode could not be used in training later.
            with torch.inference_mode(False):
                table = self._compute(torch.arange(size, device=device), size)
            self._tables[device] = table
        return table

    def _compute(self, positions: Tensor, end: int | Tensor) -> tuple[Tensor, Tensor]:
        n = self.rotary_dim
        exponents = torch.arange(0, n, 2, device=positions.device, dtype=torch.float32) / n
        base: float | Tensor = self.base
        if self.original_length is not None:
            length = end.clamp(min=self.original_length) if isinstance(end, Tensor) else max(end, self.original_length)
            base = base * (self.factor * length / self.original_length - (self.factor - 1)) ** (n / (n - 2))
        frequencies = 1.0 / base**exponents
        if self.scaling == "linear":
            frequencies = frequencies / self.factor
        angles = positions.to(torch.float32)[..., None] * frequencies
        return angles.cos(), angles.sin()

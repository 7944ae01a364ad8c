"""One graph for several sizes: inputs padded up to the next of a few, where the caller says that this is right."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from heedful.errors import wrong_type, wrong_value
from heedful.patterns.arguments import describe, integer

Place = int | str


class Buckets:
    """Sizes that inputs are padded up to, along one dimension.

    Padding is right where the model's answers at the real places do not depend on what is behind them, as for a causal
    model or for one whose mask is an input too and is padded with "do not attend". Nothing checks that.

    Args:
        sizes: the sizes that there are to be graphs for, 1 or more each. A larger call has a graph of its own.
        dim: the dimension of the inputs, from 0 on.
        pad: for each input that is padded, by position or by keyword, the number to pad with, such as
            {"input_ids": 0, "attention_mask": 0}. Each is a tensor, and all have the same size along `dim`.
        output_dim: the dimension of every output that is as long as `dim` of the inputs and is cut back to it; None
            leaves outputs at the bucket's size. An output of another size there is left as it is.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, sizes: Iterable[int], *, dim: int, pad: Mapping[Place, float | bool], output_dim: int | None = None
    ) -> None:
        self.sizes = tuple(sorted({integer("sizes", size, 1) for size in sizes}))
        self.dim = integer("dim", dim, 0)
        self.output_dim = None if output_dim is None else integer("output_dim", output_dim)
        self.pad = dict(pad)
        if not self.sizes:
            raise wrong_value("sizes", "none", "one size or more")
        if not self.pad:
            raise wrong_value("pad", "{}", "one input or more, with the number to pad it with")
        for place, value in self.pad.items():
            if not isinstance(place, int | str) or isinstance(place, bool):
                raise wrong_type("pad", describe(place), "positions and names of inputs")
            if not isinstance(value, int | float):
                raise wrong_type(f"pad[{place!r}]", describe(value), "a number")

    def size_of(self, args: tuple[object, ...], kwargs: dict[str, object]) -> int:
        """What the padded inputs of a call have along `dim`.

        Raises:
            TypeError, ValueError: one is missing or no tensor, or they do not agree.
        """
        found: dict[Place, int] = {}
        for place in self.pad:
            there = place < len(args) if isinstance(place, int) else place in kwargs
            if not there:
                raise wrong_value("buckets", f"a call without input {place!r}", "calls that have every input of pad")
            tensor = args[place] if isinstance(place, int) else kwargs[place]
            if not isinstance(tensor, Tensor):
                raise wrong_type(f"input {place!r}", describe(tensor), "a tensor, as buckets pad it")
            if tensor.ndim <= self.dim:
                raise wrong_value(
                    f"input {place!r}", f"shape {tuple(tensor.shape)}", f"more than {self.dim} dimensions"
                )
            found[place] = tensor.shape[self.dim]
        if len(set(found.values())) > 1:
            raise wrong_value("buckets", f"inputs of sizes {found} along dimension {self.dim}", "inputs of one size")
        return next(iter(found.values()))

    def bucket(self, size: int) -> int:
        """The size of the graph that serves a call; its own where there is no bucket for it."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else size

    def padded(
        self, args: tuple[object, ...], kwargs: dict[str, object], bucket: int
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        """Inputs of a bucket's size."""
        longer = list(args)
        named = dict(kwargs)
        for place, value in self.pad.items():
            tensor = args[place] if isinstance(place, int) else kwargs[place]
            assert isinstance(tensor, Tensor)
            shape = list(tensor.shape)
            shape[self.dim] = bucket
            made = torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)
            made.narrow(self.dim, 0, tensor.shape[self.dim]).copy_(tensor)
            if isinstance(place, int):
                longer[place] = made
            else:
                named[place] = made
        return tuple(longer), named

    def cut(self, outputs: object, size: int, bucket: int) -> object:
        """Outputs of the call's own size, as views."""
        if self.output_dim is None or size == bucket:
            return outputs
        dim = self.output_dim

        def narrowed(tensor: Tensor) -> Tensor:
            fits = -tensor.ndim <= dim < tensor.ndim and tensor.shape[dim] == bucket
            return tensor.narrow(dim, 0, size) if fits else tensor

        return tree_map_only(Tensor, narrowed, outputs)

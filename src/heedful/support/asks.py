"""What the support matrix asks for: one kind of call each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch

from heedful.arguments import DTYPES
from heedful.patterns import (
    BigBird,
    BlockSparse,
    Causal,
    Chunked,
    Dilated,
    Documents,
    Full,
    Global,
    Longformer,
    Mask,
    Padding,
    Pattern,
    Prefix,
    SlidingWindow,
)
from heedful.problem import Problem

# One call of this size is asked about; what a row is about takes the place of its field.
BATCH, HEADS, LENGTH, HEAD_DIM = 2, 4, 64, 64

INPUTS, KEYS, OPTIONS, DERIVATIVES = "Inputs", "Which keys a query sees", "Options", "Derivatives and transforms"
GROUPS = (INPUTS, KEYS, OPTIONS, DERIVATIVES)


@dataclass(frozen=True)
class Ask:
    """One row of the matrix."""

    name: str
    title: str
    group: str
    pattern: Pattern = Full()  # noqa: RUF009
    features: frozenset[str] = frozenset()
    """Names out of `heedful.problem.FEATURES` that a call of this kind needs."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """Fields of `heedful.problem.Problem` in which it differs."""
    gradients: bool = True
    """Whether to ask for gradients beside the output; no door gives them where this is False."""

    def problem(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        """The call on a device type and of a dtype, where the row is not about these."""
        common = Problem(
            BATCH,
            HEADS,
            HEADS,
            LENGTH,
            LENGTH,
            HEAD_DIM,
            HEAD_DIM,
            dtype,
            device,
            self.pattern.schedule,
            self.features,
        )
        return common._replace(**dict(self.changes))  # type: ignore[arg-type]


@cache
def asks() -> tuple[Ask, ...]:
    """The rows, in the order of `GROUPS`."""
    return (*_inputs(), *_keys(), *_options(), *_derivatives())


def _inputs() -> list[Ask]:
    rows = [
        Ask(str(dtype).removeprefix("torch."), str(dtype).removeprefix("torch."), INPUTS, changes={"dtype": dtype})
        for dtype in DTYPES
    ]
    for size in (80, 128, 256, 512, 1024):
        rows.append(Ask(f"head_dim_{size}", f"head dim {size}", INPUTS, changes={"head_dim": size, "value_dim": size}))
    rows.append(Ask("value_dim", "values of another width than keys", INPUTS, changes={"value_dim": HEAD_DIM // 2}))
    rows.append(Ask("grouped_heads", "grouped heads", INPUTS, changes={"kv_heads": HEADS // 2}))
    rows += [Ask(device, f"tensors on {device}", INPUTS, changes={"device_type": device}) for device in ("cpu", "cuda")]
    return rows


def _keys() -> list[Ask]:
    half = LENGTH // 2
    ends = torch.tensor([0, half - 5, LENGTH], dtype=torch.int32)
    stops = torch.tensor([LENGTH, half], dtype=torch.int32)
    blocks = torch.tensor([[True, False], [True, True]])
    mask = torch.arange(LENGTH)[:, None] % 3 != torch.arange(LENGTH) % 5
    patterns: list[tuple[str, Pattern]] = [
        ("full", Full()),
        ("causal", Causal()),
        ("top_left", Causal(0)),
        ("window", SlidingWindow(9, 0)),
        ("dilated", Dilated(5, 3)),
        ("chunked", Chunked(16)),
        ("prefix", Causal() | Prefix(8)),
        ("global", Global(3) | SlidingWindow(6)),
        ("longformer", Longformer(6, 2)),
        ("big_bird", BigBird(8, 3, 1, 1, seed=3)),
        ("block_sparse", BlockSparse(blocks, half)),
        ("documents", Documents(ends, within=Causal())),
        ("padding", Padding(0, stops)),
        ("mask", Mask(mask)),
    ]
    titles = {
        "full": "every key",
        "causal": "causal, the last query at the last key",
        "top_left": "causal, the first query at the first key",
        "window": "sliding window",
        "dilated": "dilated window",
        "chunked": "chunks",
        "prefix": "prefix, bidirectional",
        "global": "global positions",
        "longformer": "Longformer",
        "big_bird": "BigBird",
        "block_sparse": "map of blocks",
        "documents": "packed documents",
        "padding": "padding, lengths",
        "mask": "bool mask",
    }
    return [Ask(name, titles[name], KEYS, pattern) for name, pattern in patterns]


def _options() -> list[Ask]:
    titles = {
        "bias": "float bias",
        "alibi": "ALiBi slopes",
        "softcap": "softcap",
        "sinks": "attention sinks",
        "dropout": "dropout",
        "lse": "log-sum-exp returned",
        "weights": "weights returned",
        "sparse_weights": "weights returned as a sparse tensor",
    }
    rows = [Ask(name, title, OPTIONS, features=frozenset({name})) for name, title in titles.items()]
    paged = Ask("paged", "keys and values in pages", OPTIONS, features=frozenset({"paged"}), gradients=False)
    return [*rows, paged]


def _derivatives() -> list[Ask]:
    gradient = {"gradient"}
    return [
        Ask(name, title, DERIVATIVES, features=frozenset(features), gradients=False)
        for name, title, features in (
            ("gradient", "gradients", gradient),
            ("second_order", "gradients of gradients", gradient | {"second_order"}),
            ("forward_mode", "forward-mode derivatives", {"forward_mode"}),
            ("vmap", "vmap", {"vmap"}),
        )
    ]

"""The calls that `heedful bench --gpu` times, as data: sizes, patterns, peers, and what is aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from heedful import Pattern

FLASH, CUDNN, FLEX, FLASH_ATTN = "SDPA flash", "SDPA cuDNN", "FlexAttention", "flash-attn"
# Its block mask made in each call: by its builder as it is, and by its builder compiled.
FLEX_MASK, FLEX_MASK_COMPILED = "FlexAttention, mask made", "FlexAttention, mask made by compiled code"
BEST, COPY = "best", "copy"
WINDOW = 1024
# Queries times batch of every dense case, so that all have work enough for the device.
TOKENS = 16384
HIDDEN = 2048
FLEX_LENGTH = 4096


@dataclass(frozen=True)
class Goal:
    """A ratio that is aimed at: to a peer, to the best of all peers, or to the bandwidth of a copy."""

    against: str
    first: float
    goal: float


@dataclass(frozen=True)
class Case:
    """One call in bfloat16 and who runs it beside heedful; pattern is a name out of `make_pattern`."""

    section: Literal["forward", "backward", "window", "decode", "patterns"]
    name: str
    pattern: str
    q_length: int
    k_length: int
    head_dim: int = 128
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    peers: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that one query attends to."""
        keys = min(self.k_length, WINDOW) if self.pattern == "window" else self.k_length
        return 2 * 2 * self.batch * self.kv_heads * keys * self.head_dim


def cases(*, quick: bool = False) -> list[Case]:
    """The whole table, or one length of each kind."""
    found = [
        _dense("forward", dim, causal, length)
        for dim in (64, 128)
        for causal in (False, True)
        for length in ((4096,) if quick else (1024, 2048, 4096, 8192, 16384))
    ]
    found += [_window(length) for length in ((16384,) if quick else (16384, 32768, 65536))]
    found += [
        _dense("backward", 128, causal, length)
        for causal in (False, True)
        for length in ((4096,) if quick else (1024, 4096, 16384))
    ]
    found += [_decode(batch) for batch in (1, 16)]
    found.append(_decode_window(16))
    return found + _patterns()


def _dense(section: Literal["forward", "backward"], dim: int, causal: bool, length: int) -> Case:
    goals = {
        "forward": (Goal(FLASH, 1.15, 1.3), Goal(BEST, 0.6, 0.75)),
        "backward": (Goal(FLASH, 1.0, 1.15),),
    }[section]
    heads = HIDDEN // dim
    # FlexAttention compiles for each length and is never the best of dense attention: one length says so.
    flex = (FLEX,) if section == "forward" and length == FLEX_LENGTH else ()
    return Case(
        section,
        f"{section} d{dim} {'causal' if causal else 'full'} {length}",
        "causal" if causal else "full",
        length,
        length,
        dim,
        max(1, TOKENS // length),
        heads,
        heads,
        (FLASH, CUDNN, *flex, FLASH_ATTN),
        goals,
    )


def _window(length: int) -> Case:
    return Case(
        "window",
        f"window {WINDOW} {length}",
        "window",
        length,
        length,
        heads=32,
        kv_heads=8,
        peers=(FLEX, FLEX_MASK, FLEX_MASK_COMPILED, FLASH_ATTN),
        goals=(Goal(FLEX, 1.1, 1.3), Goal(FLEX_MASK, 3.0, 10.0), Goal(FLEX_MASK_COMPILED, 3.0, 10.0)),
    )


def _decode(batch: int) -> Case:
    return Case(
        "decode",
        f"decode 32/8 heads, 16384 keys, batch {batch}",
        "full",
        1,
        16384,
        batch=batch,
        heads=32,
        kv_heads=8,
        peers=(FLASH, CUDNN),
        goals=(Goal(COPY, 0.8, 0.92),),
    )


def _decode_window(batch: int) -> Case:
    name = f"decode 32/8 heads, {WINDOW} of 16384 keys, batch {batch}"
    return Case("decode", name, "window", 1, 16384, batch=batch, heads=32, kv_heads=8, peers=(FLEX, FLASH_ATTN))


def _patterns() -> list[Case]:
    """The time of other patterns beside that of full attention, the first of them."""
    names = "full", "longformer", "bigbird", "documents causal", "dilated"
    return [Case("patterns", f"pattern {name}", name, TOKENS, TOKENS) for name in names]


def make_pattern(name: str, length: int, device: torch.device) -> Pattern:
    """The pattern that a case names, its tensors on a device."""
    import torch

    from heedful import BigBird, Causal, Dilated, Documents, Full, Longformer, SlidingWindow

    ends = torch.arange(0, length + 1, min(length, 1024), dtype=torch.int32, device=device)
    made: dict[str, Callable[[], Pattern]] = {
        "full": Full,
        "causal": Causal,
        "window": lambda: SlidingWindow(WINDOW - 1, 0),
        "longformer": lambda: Longformer(256, 16),
        "bigbird": lambda: BigBird(64, 3, 2, 3),
        "documents causal": lambda: Documents(ends, within=Causal()),
        "dilated": lambda: Dilated(64, 8),
    }
    return made[name]()


def named(chosen: Sequence[Case], only: str | None) -> list[Case]:
    """The cases whose names contain a text."""
    return [case for case in chosen if only is None or only in case.name]

"""The arguments that flash-attn's functions share, as `heedful.attention` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch

from heedful.errors import wrong_type, wrong_value
from heedful.patterns import Causal, Full, Pattern, SlidingWindow
from heedful.patterns.arguments import LARGEST, describe

Window = tuple[int, int] | Sequence[int]

UNLIMITED = (-1, -1)

# The same object for the same window, since equal patterns are compared by identity first; emptied when full.
_patterns: dict[tuple[int, int, bool], Pattern] = {}
_MAX_PATTERNS = 1024


def window_pattern(window_size: Window, causal: bool) -> Pattern:
    """What a window and causality mean together, aligned bottom-right: queries see the keys from window_size[0] before
    their own position to window_size[1] after it, causal ones none after; a negative side has no limit."""
    left, right = UNLIMITED if type(window_size) is tuple and window_size == UNLIMITED else window_sides(window_size)
    # No functools.cache: torch.compile would trace into the function behind it, and warn.
    if torch.compiler.is_compiling():
        return _pattern(left, right, bool(causal))
    key = left, right, bool(causal)
    found = _patterns.get(key)
    if found is None:
        if len(_patterns) >= _MAX_PATTERNS:
            _patterns.clear()
        found = _patterns[key] = _pattern(*key)
    return found


def window_sides(window_size: Window) -> tuple[int, int]:
    """Both sides as ints, -1 for no limit.

    Raises:
        TypeError, ValueError: it is no pair of ints.
    """
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise wrong_value("window_size", describe(window_size), "two ints (left, right), -1 for no limit") from None
    return _side(left), _side(right)


def scale_or_none(softmax_scale: float | None) -> float | None:
    if softmax_scale is not None:
        if not isinstance(softmax_scale, (float, int, Real)):
            raise wrong_type("softmax_scale", describe(softmax_scale), "a number, or None for 1/sqrt(headdim)")
        if not -math.inf < softmax_scale < math.inf:
            raise wrong_value("softmax_scale", softmax_scale, "a finite number, or None for 1/sqrt(headdim)")
    return softmax_scale


def softcap_or_none(softcap: float) -> float | None:
    """None where there is no cap, which flash-attn says by 0 or less."""
    if softcap == 0.0:
        return None
    if not isinstance(softcap, (float, int, Real)):
        raise wrong_type("softcap", describe(softcap), "a number; 0.0 for none")
    if not softcap < math.inf:
        raise wrong_value("softcap", softcap, "a finite number; 0.0 for none")
    return softcap if softcap > 0 else None


def _pattern(left: int, right: int, causal: bool) -> Pattern:
    if causal:
        right = 0
    if left < 0 and right < 0:
        return Full()
    if left < 0 and right == 0:
        return Causal()
    return SlidingWindow(None if left < 0 else left, None if right < 0 else right)


def _side(value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise wrong_type("window_size", describe(value), "two ints (left, right), -1 for no limit")
    side = value.__index__()
    if side > LARGEST:
        raise wrong_value("window_size", side, f"ints up to {LARGEST}")
    return max(int(side), -1)

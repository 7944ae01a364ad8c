"""The engine as a backend: `torch.ops.heedful` on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heedful.backend.base import Backend, Shortcut
from heedful.backend.native import library, prefer
from heedful.backend.native.gradient import (
    EngineAttention,
    Plan,
    Settings,
    TransformedAttention,
    apply_biased_eagerly,
    apply_eagerly,
    apply_plain_eagerly,
    attend,
    compute_weights,
)
from heedful.dropout import draw_seed
from heedful.problem import FEATURES, Attention, Call, Problem, known


class NativeBackend(Backend):
    """Tiled attention that visits only the tiles that the pattern's schedule reaches."""

    name = "native"
    devices = frozenset({"cpu"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    max_head_dim = 512
    features = frozenset({"bias", "alibi", "softcap", "sinks", "dropout", "lse", "weights", "sparse_weights", "paged"})
    gradient = True
    operators = "heedful"
    """The namespace of the operators that run a call."""

    def available(self) -> str | None:
        try:
            library.load_operators()
        except ImportError as error:
            return str(error)
        prefer.load_table()
        return None

    def not_supported_reasons(self, problem: Problem) -> list[str]:
        reasons = super().not_supported_reasons(problem)
        if "paged" in problem.features:
            reasons += [
                f"does not support {FEATURES[name]} over {FEATURES['paged']}"
                for name in ("weights", "sparse_weights", "gradient")
                if name in problem.features
            ]
        return reasons

    def run(self, call: Call) -> Attention:
        problem, settings = call.problem, settings_of(call, self.operators)
        operands = call.pattern.operands(problem.q_length, problem.k_length, call.query.device)
        tensors = call.query, call.key, call.value, operands, call.bias, call.alibi_slopes, call.sinks
        if "gradient" in problem.features:
            transformed = torch._C._are_functorch_transforms_active()
            function = TransformedAttention if transformed else EngineAttention
            return _attend_differentiably(function.apply, settings, *tensors, query_offset=call.query_offset)
        return _attend(settings, *tensors, call.pages, call.query_offset)

    def forget(self) -> None:
        library.clear_caches()

    def shortcut(self, call: Call) -> Shortcut | None:
        if call.pages is not None or call.query_offset is not None:
            return None
        problem, settings = call.problem, settings_of(call, self.operators)
        whole = len(settings.parts) == 1
        if whole and not problem.features - {"lse"}:
            return _plain_shortcut(settings)
        if whole and problem.features in ({"gradient"}, {"gradient", "bias"}):
            return _gradient_shortcut(settings, "bias" in problem.features)
        if whole and not problem.features - {"bias", "alibi", "softcap", "sinks", "lse"}:
            return _feature_shortcut(settings, problem.features - {"lse"} == {"bias"})
        gradient = "gradient" in problem.features
        bare = not (settings.lse or settings.weights)

        def run(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            operands: tuple[Tensor, ...],
            bias: Tensor | None = None,
            alibi_slopes: Tensor | None = None,
            sinks: Tensor | None = None,
        ) -> Tensor | Attention:
            tensors = q, k, v, operands, bias, alibi_slopes, sinks
            if gradient:
                result = _attend_differentiably(apply_eagerly, settings, *tensors)
            else:
                result = _attend(settings, *tensors)
            return result.out if bare else result

        return run


# Two calls of the engine and their sum cost more than a few pairs too many.
PARTED_PAIRS = 1 << 20


def settings_of(call: Call, operators: str) -> Settings:
    problem, features = call.problem, call.problem.features
    code = problem.schedule.encode()
    parts: tuple[tuple[int, ...], ...] = (code,)
    if call.pages is None and known(problem.q_length * problem.k_length >= PARTED_PAIRS):
        parts = tuple([part.encode() for part in problem.schedule.parted()])
    return Settings(
        code,
        call.scale,
        0.0 if call.softcap is None else call.softcap,
        call.dropout_p,
        call.blhd,
        "sparse" if "sparse_weights" in features else "dense" if "weights" in features else None,
        "lse" in features,
        parts,
        operators,
    )


def _attend(
    settings: Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Tensor, ...],
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    pages: Tensor | None = None,
    query_offset: Tensor | None = None,
) -> Attention:
    slopes, seed = slopes_of(alibi_slopes), _seed(settings, query)
    out, lse = attend(settings, query, key, value, operands, bias, slopes, sinks, seed, pages, query_offset)
    weights: tuple[Tensor, ...] = ()
    if settings.weights is not None:
        weights = compute_weights(settings, query, key, lse, operands, bias, slopes, seed, query_offset)
    return _result(settings, key, out, lse, *weights)


def _attend_differentiably(
    apply: Callable[..., Any],
    settings: Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: tuple[Tensor, ...],
    bias: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    query_offset: Tensor | None = None,
) -> Attention:
    found = apply(
        query,
        key,
        value,
        bias,
        slopes_of(alibi_slopes),
        sinks,
        _seed(settings, query),
        query_offset,
        settings,
        *operands,
    )
    if isinstance(found, Tensor):
        return Attention(found, None, None)
    return _result(settings, key, *found)


def slopes_of(alibi_slopes: Tensor | None) -> Tensor | None:
    """(B or 1, H) or (B or 1, H, Lq), as the operators take them."""
    if alibi_slopes is None:
        return None
    return alibi_slopes[:, :, 0, 0] if alibi_slopes.shape[2] == 1 else alibi_slopes[..., 0]


def _seed(settings: Settings, query: Tensor) -> Tensor | None:
    return draw_seed(query.device) if settings.dropout_p else None


def _result(settings: Settings, key: Tensor, out: Tensor, lse: Tensor, *weights: Tensor) -> Attention:
    returned = weights[0] if weights else None
    if settings.weights == "sparse":
        values, indices = weights
        returned = torch.sparse_coo_tensor(
            indices, values, (*lse.shape, key.shape[2]), is_coalesced=True, check_invariants=False
        )
    return Attention(out, lse if settings.lse else None, returned)


# Past OpOverload.__call__, which only passes on its arguments: 0.3 of 5 µs.
def _plain_shortcut(settings: Settings) -> Shortcut:
    forward: Any = getattr(torch.ops, settings.operators).attention_forward.default._op
    code, scale, blhd, with_lse = list(settings.schedule), settings.scale, settings.blhd, settings.lse

    def run(q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...]) -> Tensor | Attention:
        out, lse = forward(q, k, v, operands, code, scale, blhd)
        return Attention(out, lse, None) if with_lse else out

    return run


def _feature_shortcut(settings: Settings, only_bias: bool) -> Shortcut:
    forward: Any = getattr(torch.ops, settings.operators).attention_forward.default._op
    code, scale, softcap, blhd, with_lse = (
        list(settings.schedule), settings.scale, settings.softcap, settings.blhd, settings.lse
    )  # fmt: skip

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: tuple[Tensor, ...],
        bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor | Attention:
        out, lse = forward(q, k, v, operands, code, scale, blhd, bias, slopes_of(alibi_slopes), sinks, softcap)
        return Attention(out, lse, None) if with_lse else out

    def run_biased(
        q: Tensor, k: Tensor, v: Tensor, operands: tuple[Tensor, ...], bias: Tensor, *_: None
    ) -> Tensor | Attention:
        out, lse = forward(q, k, v, operands, code, scale, blhd, bias)
        return Attention(out, lse, None) if with_lse else out

    return run_biased if only_bias else run


def _gradient_shortcut(settings: Settings, biased: bool) -> Shortcut:
    operators: Any = getattr(torch.ops, settings.operators)
    forward, backward = operators.attention_forward.default._op, operators.attention_backward.default._op
    plan = Plan(forward, backward, list(settings.schedule), settings.scale, settings.blhd)
    if biased:
        return lambda q, k, v, operands, bias, *_: apply_biased_eagerly(q, k, v, bias, plan, *operands)
    return lambda q, k, v, operands: apply_plain_eagerly(q, k, v, plan, *operands)

"""From a checked call to its results."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from heedful.numpy.arrays import Array, Given, cast, dtype_of, storage_dtype
from heedful.numpy.prepared import Prepared
from heedful.numpy.request import Request, in_index_order
from heedful.patterns import Pattern
from heedful.patterns.arrays import as_numpy_operand


class Attention(NamedTuple):
    """What a call with return_lse or return_weights returns.

    Attributes:
        out: as without them.
        lse: (B, H, Sq), (H, Sq) or (Sq,) for inputs of 4, 3 or 2 dimensions: the natural logarithm of each row's sum
            of exponentials, float32 (float64 for float64), -inf for a row with no key and no sink. None unless
            return_lse.
        weights: (B, H, Sq, Sk), (H, Sq, Sk) or (Sq, Sk), in the output's precision. None unless return_weights.
    """

    out: Any
    lse: Array | None
    weights: Array | None


def run(
    prepared: Prepared,
    threads: object,
    q: Array,
    k: Array,
    v: Array,
    pattern: Pattern | None,
    bias: Array | None,
    alibi_slopes: Array | None,
    sinks: Array | None,
    out: Array | None,
) -> Attention:
    """Runs a call of a known kind, into `out` or new memory. A pattern is needed where it has operands."""
    operands: tuple[Array, ...] = ()
    if pattern is not None and prepared.slots:
        pattern.validate(*prepared.sizes)
        operands = tuple([as_numpy_operand(array) for array in pattern.arrays(*prepared.sizes[2:])])
    if out is None:
        out = np.empty(prepared.out_shape, prepared.out_dtype)
    lse = weights = None
    if prepared.return_lse or prepared.return_weights:
        lse = np.empty(prepared.lse_shape, prepared.statistics)
    if prepared.return_weights:
        weights = np.empty(prepared.weights_shape, prepared.out_dtype)
    # numpy gives arrays without elements strides that the engine calls odd.
    if out.size:
        prepared.run(threads, q, k, v, out, lse, weights, bias, alibi_slopes, sinks, operands)
    return Attention(out, lse if prepared.return_lse else None, weights)


def run_first(
    request: Request, threads: object, out: object, return_lse: bool, return_weights: bool
) -> tuple[Attention, Prepared | None]:
    """Runs a call of a kind that is not known yet; the kind, to be remembered, where nothing had to be copied."""
    written = request.output_precision
    in_place = "out" not in request.copied
    returned = out is None or return_weights
    dtype = dtype_of(written) if in_place and returned else storage_dtype(request.precision)
    prepared = Prepared(request, dtype, return_lse, return_weights)
    target = None if request.out is None or not in_place else in_index_order(request.out)
    found = run(
        prepared,
        threads,
        request.query,
        request.key,
        request.value,
        request.pattern,
        request.bias,
        request.alibi_slopes,
        request.sinks,
        target,
    )
    if not in_place:
        result = cast(Given(found.out, request.precision), written).array
        if request.out is not None:
            request.out[...] = result
        else:
            found = found._replace(out=result.view(dtype_of(written)))
        if found.weights is not None:
            rounded = cast(Given(found.weights, request.precision), written).array
            found = found._replace(weights=rounded.view(dtype_of(written)))
    if out is not None:
        found = found._replace(out=out)
    return found, None if request.copied else prepared

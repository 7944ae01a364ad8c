"""The launches as torch operators, ``torch.ops.heedful_triton.*``, with the signatures of the engine's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from heedful.backend.native import fakes
from heedful.backend.triton import gradients, launch

_WEIGHTS = (
    "(Tensor query, Tensor key, Tensor lse, Tensor[] operands, int[] schedule, float scale, Tensor? bias, "
    "Tensor? alibi_slopes, float softcap, float dropout_p, Tensor? seed, Tensor? query_offset=None) "
)
_SCHEMAS = {
    "attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor[] operands, int[] schedule, float scale, bool blhd, "
        "Tensor? bias=None, Tensor? alibi_slopes=None, Tensor? sinks=None, float softcap=0.0, float dropout_p=0.0, "
        "Tensor? seed=None, Tensor? pages=None, Tensor? query_offset=None) -> (Tensor out, Tensor lse)"
    ),
    "attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor[] operands, "
        "int[] schedule, float scale, Tensor? bias, Tensor? alibi_slopes, float softcap, float dropout_p, "
        "Tensor? seed, Tensor? grad_lse, Tensor? grad_weights, bool bias_gradient, bool slopes_gradient, "
        "Tensor? query_offset=None) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor delta, Tensor grad_bias, Tensor grad_slopes)"
    ),
    "attention_weights": _WEIGHTS + "-> Tensor",
    "attention_weights_sparse": _WEIGHTS + "-> (Tensor indices, Tensor values)",
}
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "attention_forward": launch.forward,
    "attention_backward": gradients.backward,
    "attention_weights": gradients.weights,
    "attention_weights_sparse": gradients.sparse_weights,
}


@functools.cache
def register() -> torch.library.Library:
    """Registers the operators, once."""
    library = torch.library.Library("heedful_triton", "DEF")
    for name, schema in _SCHEMAS.items():
        library.define(name + schema)
        # On a CPU under Triton's interpreter.
        for key in ("CUDA", "CPU"):
            library.impl(name, _FUNCTIONS[name], key)
        torch.library.register_fake(f"heedful_triton::{name}", fakes.FAKES[name], lib=library)
    return library

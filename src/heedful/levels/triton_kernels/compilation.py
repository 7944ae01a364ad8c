"""The kernels compiled for a GPU without having one: what CI holds them to where nothing can run them."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from heedful.levels.triton_kernels import activations, normalisation, rotation

_COUNTS = {"columns", "count", "rows", "programs", "heads", "length", "half"}


def specimens(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Each kernel's name, source, types of its arguments and constants, for tensors of "fp32", "fp16" or "bf16"."""
    import triton.language as tl

    row = {"EXACT": tl.float32, "BLOCK": 1024}
    turn = {"EXACT": tl.float32, "ROWS": 16, "BLOCK": 32}
    for name, kernel, constants in (
        ("layer_norm_forward", normalisation.layer_norm_forward, row | {"ACTIVATE": False}),
        ("layer_norm_gelu_forward", normalisation.layer_norm_forward, row | {"ACTIVATE": True}),
        ("layer_norm_backward", normalisation.layer_norm_backward, row | {"ACTIVATE": False}),
        ("layer_norm_gelu_backward", normalisation.layer_norm_backward, row | {"ACTIVATE": True}),
        ("gelu_forward", activations.gelu_forward, row),
        ("gelu_backward", activations.gelu_backward, row),
        ("swiglu_forward", activations.swiglu_forward, row),
        ("swiglu_backward", activations.swiglu_backward, row),
        ("rotate", rotation.rotate, turn | {"SIGN": 1}),
        ("rotate_back", rotation.rotate, turn | {"SIGN": -1}),
    ):
        types = {argument: _type(argument, dtype) for argument in kernel.arg_names if argument not in constants}
        yield name, kernel, types | dict.fromkeys(constants, "constexpr"), constants


def _type(argument: str, dtype: str) -> str:
    if argument in ("mean", "inverse", "partial_weight", "partial_bias", "cos", "sin"):
        return "*fp32"
    if argument == "eps":
        return "fp32"
    strides = ("_stride", "_batch", "_head", "_row")
    return "i32" if argument in _COUNTS or argument.endswith(strides) else f"*{dtype}"


def compile_for(architecture: int, dtype: str = "fp32") -> dict[str, bytes]:
    """The machine code of every kernel for an Nvidia architecture, such as 80 or 90.

    Raises:
        RuntimeError: Triton's compiler or its assembler refuses a kernel.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("cuda", architecture, 32)
    compiled = {}
    for name, kernel, types, constants in specimens(dtype):
        compiled[name] = triton.compile(ASTSource(kernel, types, constants), target=target).asm["cubin"]
    return compiled

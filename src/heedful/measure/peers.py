"""Other engines that a user might pick, each as a call on (q, k, v) of (B, H, L, D)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .rows import Call
from .workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor


def make_peer(workload: Workload, threads: int) -> Call:
    """The peer's call for a workload, compiled where the peer compiles.

    Raises:
        ImportError: the peer is not installed.
    """
    builders = {"flex": _flex, "onnxruntime": _onnxruntime, "openvino": _openvino}
    return builders[workload.baseline](workload, threads)


def _flex(workload: Workload, threads: int) -> Call:
    """Compiled FlexAttention. Its block mask is built here, outside of the timed call."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    del threads
    pattern = workload.make_pattern()
    assert pattern is not None
    dense = pattern.dense(workload.q_length, workload.key_length)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return dense[0, 0, i, j]

    def window(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= 128

    # The window is given as arithmetic, as a user of FlexAttention writes it; anything else reads the mask.
    mask_mod = window if workload.pattern == "window ±128" else visible
    mask = create_block_mask(mask_mod, None, None, workload.q_length, workload.key_length, device="cpu")
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def _onnxruntime(workload: Workload, threads: int) -> Call:
    """onnxruntime's fused MultiHeadAttention, which takes (B, L, H·D)."""
    import onnxruntime
    import torch
    from onnx import TensorProto, helper

    b, h, length, d = workload.batch, workload.heads, workload.q_length, workload.head_dim
    names, shape = ("query", "key", "value"), [b, length, h * d]
    node = helper.make_node(
        "MultiHeadAttention",
        names,
        ["out"],
        domain="com.microsoft",
        num_heads=h,
        scale=1 / math.sqrt(d),
        unidirectional=int(workload.pattern == "causal"),
    )
    graph = helper.make_graph(
        [node],
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    packed: dict[int, dict[str, Any]] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its layout is made once per input, so that the peer is not charged for a transposition.
        feed = packed.get(id(q))
        if feed is None:
            rows = (t.transpose(1, 2).reshape(shape).numpy() for t in (q, k, v))
            feed = packed.setdefault(id(q), dict(zip(names, rows, strict=True)))
        out = session.run(["out"], feed)[0]
        return torch.from_numpy(out).view(b, length, h, d).transpose(1, 2)

    return run


def _openvino(workload: Workload, threads: int) -> Call:
    """OpenVINO's scaled_dot_product_attention, computing in the workload's type."""
    import numpy
    import openvino
    import torch
    from openvino import opset13

    shape = [workload.batch, workload.heads, workload.q_length, workload.head_dim]
    kind = {"float32": openvino.Type.f32, "bfloat16": openvino.Type.bf16}[workload.dtype]
    parameters = [opset13.parameter(shape, kind, name) for name in ("query", "key", "value")]
    node = opset13.scaled_dot_product_attention(*parameters, causal=workload.pattern == "causal")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": kind.to_string()}
    request = openvino.Core().compile_model(openvino.Model([node], parameters), "CPU", settings).create_infer_request()
    bits = torch.int16 if workload.dtype == "bfloat16" else torch.float32
    wrapped: dict[int, list[Any]] = {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = wrapped.get(id(q))
        if tensors is None:
            arrays = [t.view(bits).numpy() for t in (q, k, v)]
            tensors = wrapped.setdefault(id(q), [openvino.Tensor(a, openvino.Shape(shape), kind) for a in arrays])
        request.infer(dict(enumerate(tensors)))
        out = numpy.frombuffer(request.get_output_tensor().data, dtype=arrays_dtype(bits))
        return torch.from_numpy(out.copy()).view(getattr(torch, workload.dtype)).view(shape)

    def arrays_dtype(torch_dtype: torch.dtype) -> Any:
        return numpy.int16 if torch_dtype == torch.int16 else numpy.float32

    return run

"""torch.ops.heedful.attention_forward: the engine as torch sees it; the other operators are in
test_operator_gradient.py."""

import subprocess
import sys

import pytest
import torch
from inputs import attention_inputs
from tolerance import expected
from torch import Tensor

from heedful import Mask
from heedful.backend.native import library
from heedful.backend.reference.formula import attend
from heedful.dropout import keep_mask

library.load_operators()
attention_forward = torch.ops.heedful.attention_forward.default

FULL: tuple[int, ...] = ()
# One atom of one term: the diagonal j - i is at most k_length - q_length.
CAUSAL = (1, 1, 0, 2, 1, 0, -2, 1, -1)
# One atom of two terms: causal, and operand 0 is True at (b, h, i, j).
CAUSAL_AND_MASK = (1, 2, 0, 2, 1, 0, -2, 1, -1, 5, 0)
# One atom: keys before operand 0 of the batch item.
PADDING = (1, 1, 0, 1, 1, -1, 0, 1, -1)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inputs(batch, heads, kv_heads, q_length, k_length, head_dim, value_dim, dtype=torch.float32):
    return attention_inputs(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_length=q_length,
        k_length=k_length,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
    )


def check(
    out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
):
    reference = expected(query, key, value, pattern=None if mask is None else Mask(mask), scale=scale)
    reference.out.check(out, "out")
    reference.lse.check(lse, "lse")
    assert out.dtype == query.dtype
    assert lse.dtype == (torch.float64 if query.dtype == torch.float64 else torch.float32)


def causal_mask(q_length: int, k_length: int) -> Tensor:
    return torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 4, 2, 17, 33, 24, 40), (1, 3, 1, 113, 130, 64, 64)])
@pytest.mark.parametrize("schedule", [FULL, CAUSAL], ids=["full", "causal"])
def test_agrees_with_fp64(dtype, shape, schedule):
    query, key, value = inputs(*shape, dtype=dtype)
    out, lse = attention_forward(query, key, value, [], schedule, 0.25, False)
    mask = causal_mask(*shape[3:5]) if schedule else None
    check(out, lse, query, key, value, 0.25, mask)


@pytest.mark.parametrize("blhd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(dtype, blhd):
    query = torch.randn(2, 19, 4, 16).to(dtype).transpose(1, 2)
    key = torch.randn(2, 2, 16, 23).to(dtype).transpose(2, 3)
    value = torch.randn(1, 2, 23, 64).to(dtype)[..., ::2].expand(2, -1, -1, -1)
    out, lse = attention_forward(query, key, value, [], CAUSAL, 0.3, blhd)
    check(out, lse, query, key, value, 0.3, causal_mask(19, 23))
    assert (out.transpose(1, 2) if blhd else out).is_contiguous()
    assert lse.is_contiguous()


def test_memory_order_changes_no_bit():
    tensors = inputs(2, 4, 2, 65, 65, 32, 48)
    for ours, theirs in zip(
        attention_forward(*tensors, [], CAUSAL, 0.2, False),
        attention_forward(*tensors, [], CAUSAL, 0.2, True),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_operands():
    query, key, value = inputs(2, 4, 2, 21, 30, 16, 16)
    mask = torch.rand(2, 1, 21, 30) < 0.5
    mask[0, 0, 3] = False
    out, lse = attention_forward(query, key, value, [mask], CAUSAL_AND_MASK, 0.5, False)
    check(out, lse, query, key, value, 0.5, mask & causal_mask(21, 30))
    assert (out[0, :, 3] == 0).all()
    assert (lse[0, :, 3] == -torch.inf).all()

    stop = torch.tensor([7, 30], dtype=torch.int32)
    out, lse = attention_forward(query, key, value, [stop], PADDING, 0.5, False)
    check(out, lse, query, key, value, 0.5, (torch.arange(30) < stop[:, None])[:, None, None])


def test_any_thread_count_gives_the_same_bits():
    tensors = inputs(2, 4, 2, 300, 300, 64, 64)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(attention_forward(*tensors, [], CAUSAL, 0.125, False))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


FEATURES = {
    "bias": lambda: {"bias": torch.randn(1, 4, 21, 1)},
    "alibi": lambda: {"alibi_slopes": torch.rand(2, 4)},
    "sinks": lambda: {"sinks": torch.randn(4)},
    "softcap": lambda: {"softcap": 1.5},
    "dropout": lambda: {"dropout_p": 0.3, "seed": torch.tensor([-7])},
    "offset": lambda: {"alibi_slopes": torch.rand(1, 4), "query_offset": torch.tensor([3, -8], dtype=torch.int32)},
    "pages": lambda: {"pages": torch.tensor([[4, 0, 1], [2, 2, 3]], dtype=torch.int32)},
}
FEATURES["all"] = lambda: {name: value for make in list(FEATURES.values())[:-1] for name, value in make().items()}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name):
    features = FEATURES[name]()
    query, key, value = inputs(2, 4, 2, 21, 30, 16, 24)
    arguments = dict(features)
    dense = key, value
    pages = arguments.pop("pages", None)
    if pages is not None:
        key, value = torch.randn(5, 2, 10, 16), torch.randn(5, 2, 10, 24)
        dense = [pool[pages.long()].transpose(1, 2).flatten(2, 3) for pool in (key, value)]
    if "seed" in arguments:
        kept = keep_mask(arguments.pop("seed"), 0.3, (2, 4, 21, 30)).double() / (1 - arguments.pop("dropout_p"))
        arguments["kept"] = kept
    if "alibi_slopes" in arguments:
        arguments["alibi_slopes"] = arguments["alibi_slopes"][:, :, None, None]
    wanted = attend(query, *dense, causal_mask(21, 30)[None, None], scale=0.2, **arguments)
    for blhd in (False, True):
        found = attention_forward(query, key, value, [], CAUSAL, 0.2, blhd, **features)
        for ours, theirs in zip(found, wanted, strict=False):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def test_optional_tensors_are_let_go():
    bias, sinks, seed = torch.randn(1, 1, 3, 3), torch.randn(4), torch.tensor([1])
    before = [tensor._use_count() for tensor in (bias, sinks, seed)]
    for _ in range(3):
        call(bias=bias, sinks=sinks, dropout_p=0.5, seed=seed)
        with pytest.raises(RuntimeError):
            call(bias=bias, sinks=sinks, dropout_p=0.5, seed=seed, scale=float("nan"))
        with pytest.raises(RuntimeError):
            call(query=(3, 8), bias=bias, sinks=sinks, dropout_p=0.5, seed=seed)
    assert [tensor._use_count() for tensor in (bias, sinks, seed)] == before


@pytest.mark.parametrize("shape", [(0, 2, 2, 4, 4, 8, 8), (2, 2, 1, 0, 4, 8, 8), (2, 2, 2, 4, 0, 8, 8)])
@pytest.mark.parametrize("blhd", [False, True])
def test_empty(shape, blhd):
    out, lse = attention_forward(*inputs(*shape), [], FULL, 1.0, blhd)
    assert out.shape == (*shape[:2], shape[3], shape[6])
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


SAMPLES = {
    "full": ((2, 4, 2, 5, 7, 8, 12), [], FULL),
    "causal": ((1, 2, 2, 9, 9, 16, 16), [], CAUSAL),
    "mask": ((2, 2, 1, 6, 5, 8, 8), [torch.ones(2, 1, 6, 5, dtype=torch.bool)], CAUSAL_AND_MASK),
    "padding": ((2, 2, 2, 6, 5, 8, 8), [torch.tensor([3, 5], dtype=torch.int32)], PADDING),
}


@pytest.mark.parametrize("blhd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample, dtype, blhd):
    shape, operands, schedule = SAMPLES[sample]
    torch.library.opcheck(
        attention_forward, (*inputs(*shape, dtype=dtype), operands, schedule, 0.5, blhd), raise_exception=True
    )


@pytest.mark.parametrize("name", FEATURES)
def test_opcheck_of_features(name):
    features = FEATURES[name]()
    tensors = inputs(2, 4, 2, 21, 30, 16, 24)
    if "pages" in features:
        tensors = tensors[0], torch.randn(5, 2, 10, 16), torch.randn(5, 2, 10, 24)
    torch.library.opcheck(attention_forward, (*tensors, [], CAUSAL, 0.5, False), features, raise_exception=True)


@pytest.mark.parametrize("blhd", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4, 2, 5, 7, 8, 12), (1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 0, 4, 8, 8), (0, 3, 1, 2, 0, 8, 4)]
)
def test_fake_is_as_real(shape, blhd):
    tensors = inputs(*shape)
    real = attention_forward(*tensors, [], FULL, 1.0, blhd)
    fake = attention_forward(*(tensor.to("meta") for tensor in tensors), [], FULL, 1.0, blhd)
    for ours, theirs in zip(real, fake, strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)


class Block(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = attention_forward(query * 2, key, value, [], CAUSAL, 0.5, True)
        return out.transpose(1, 2).flatten(2) + lse.sum()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend):
    tensors = inputs(2, 4, 2, 9, 9, 16, 16)
    compiled = torch.compile(Block(), fullgraph=True, backend=backend, dynamic=True)
    torch.testing.assert_close(compiled(*tensors), Block()(*tensors))
    tensors = inputs(1, 4, 2, 11, 12, 16, 16)
    torch.testing.assert_close(compiled(*tensors), Block()(*tensors))


def test_exports():
    tensors = inputs(2, 4, 2, 9, 9, 16, 16)
    exported = torch.export.export(Block(), tensors)
    assert "heedful.attention_forward" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*tensors), Block()(*tensors))


def call(
    query=(1, 4, 3, 8),
    key=(1, 2, 3, 8),
    value=(1, 2, 3, 8),
    query_dtype=torch.float32,
    key_dtype=torch.float32,
    operands=(),
    schedule=FULL,
    scale=1.0,
    **features,
):
    tensors = torch.ones(query, dtype=query_dtype), torch.ones(key, dtype=key_dtype), torch.ones(value)
    return attention_forward(*tensors, list(operands), schedule, scale, False, **features)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": (4, 3, 8)}, "query has 3 dimensions, and takes 4"),
        ({"value": (1, 1, 2, 3, 8)}, "value has 5 dimensions"),
        ({"key": (1, 3, 3, 8), "value": (1, 3, 3, 8)}, "key.* 3 heads"),
        ({"key": (1, 2, 3, 4)}, "key.* 4 .* 8"),
        ({"value": (1, 2, 5, 8)}, "value.* 5 .* 3"),
        ({"key_dtype": torch.float64}, "key.* dtype"),
        ({"query_dtype": torch.int64}, "query: .* takes float32"),
        ({"query_dtype": torch.int16}, "query must be float32"),
        ({"scale": float("nan")}, "scale"),
        ({"schedule": (1, 1, 99)}, "schedule"),
        ({"schedule": (1, 1, 5, 0)}, "operand"),
        ({"schedule": (1, 1, 5, 0), "operands": [torch.ones(3, 3)]}, "operand|slot"),
        ({"schedule": (1, 1, 5, 0), "operands": [torch.ones(1, 1, 3, 3, dtype=torch.int64)]}, "operand|slot"),
        ({"schedule": (1, 1, 5, 0), "operands": [torch.ones(1, 1, 3, 3, dtype=torch.int16)]}, "operands must be"),
        ({"bias": torch.zeros(3, 3)}, "bias"),
        ({"bias": torch.zeros(1, 1, 3, 4)}, "bias"),
        ({"bias": torch.zeros(1, 1, 3, 3, dtype=torch.float64)}, "bias"),
        ({"alibi_slopes": torch.zeros(1, 3)}, "alibi_slopes"),
        ({"sinks": torch.zeros(3)}, "sinks"),
        ({"softcap": -1.0}, "softcap"),
        ({"dropout_p": 1.0, "seed": torch.zeros(1, dtype=torch.int64)}, "dropout"),
        ({"dropout_p": 0.5}, "seed is None"),
        ({"dropout_p": 0.5, "seed": torch.zeros(1, dtype=torch.int32)}, "seed takes an int64 tensor"),
        ({"dropout_p": 0.5, "seed": torch.zeros(2, dtype=torch.int64)}, "seed takes .* one element"),
        ({"pages": torch.zeros(1, 0, dtype=torch.int32)}, "pages has no element"),
        ({"pages": torch.zeros(2, 3, dtype=torch.int32)}, "pages"),
        ({"query_offset": torch.zeros(2, dtype=torch.int32), "alibi_slopes": torch.zeros(1, 4)}, "query_offset"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)


FORK = """
import os, signal, sys
import torch
from heedful.backend.native import library

library.load_operators()
torch.set_num_threads(2)
query = torch.randn(2, 4, 200, 64)

# torch's own operators may hang in the child, so nothing there uses them.
def call():
    return torch.ops.heedful.attention_forward(query, query, query, [], [], 0.125, False)[0].numpy().tobytes()

if sys.argv[1] == "heedful":
    expected = call()
else:
    torch.ones(1 << 22).exp().sum()
    expected = None
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if expected in (None, call()) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert expected in (None, call())
"""


@pytest.mark.parametrize("started_by", ["heedful", "torch"])
def test_a_child_forked_after_the_pool_started_does_not_hang(started_by):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, started_by], check=True, timeout=60)

"""heedful.scaled_dot_product_attention does what PyTorch's function does, wherever it runs."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from comparison import keep_mask
from hypothesis import example, given, settings
from sdpa_calls import (
    MASKS,
    TOLERANCE,
    Call,
    calls,
    compare,
    engine_pays_always,  # noqa: F401
    make_mask,
    outcome,
    torch_sdpa,
)
from torch.utils._python_dispatch import TorchDispatchMode

import heedful
from heedful import sdpa
from heedful.backend.native import prefer
from heedful.dropout import draw_seed
from heedful.sdpa import masks
from heedful.sdpa.call import attend

sdpa_of = heedful.scaled_dot_product_attention


pytestmark = pytest.mark.usefixtures("engine_pays_always")


@pytest.fixture(autouse=True)
def _small_calls_test_the_engine(monkeypatch):
    monkeypatch.setattr(sdpa.call, "_FEW_MASKED_PAIRS", 0)


@pytest.fixture(scope="module", params=[0, 1 << 60], ids=["masks read", "masks as they come"])
def fewest_read(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sdpa.call, "_FEWEST_READ", request.param)
        heedful.clear_caches()
        yield
    heedful.clear_caches()


def taken(*arguments, **options) -> bool:
    """Whether heedful runs the call itself."""
    names = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = dict(zip(names, (None, 0.0, False, None, False), strict=True)) | options
    for name, value in zip(names, arguments[3:], strict=False):
        defaults[name] = value
    return isinstance(attend(*arguments[:3], *defaults.values()), torch.Tensor)


def qkv(*lead, q_length=33, k_length=45, dim=16, value_dim=None, dtype=torch.float32):
    shapes = (*lead, q_length, dim), (*lead, k_length, dim), (*lead, k_length, value_dim or dim)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def test_signature():
    def named(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    def documented(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
    ): ...

    assert named(sdpa_of) == named(documented)
    # PyTorch's own has no signature but in its documentation.
    first, *_ = F.scaled_dot_product_attention.__doc__.strip().splitlines()
    for name, *_ in named(documented):
        assert name in first + F.scaled_dot_product_attention.__doc__


# What the strategy must find sooner or later, found at once.
@example(Call(((3, 4, 17, 8), (3, 4, 33, 8), (3, 4, 33, 8)), mask="band", mask_shape=(17, 33)))
@example(Call(((2, 6, 17, 8), (2, 3, 33, 8), (2, 1, 33, 5)), options={"enable_gqa": True}, gradients=True))
@example(Call(((2, 6, 17, 8), (2, 2, 33, 8), (2, 3, 33, 8)), options={"enable_gqa": True}))
@example(Call(((2, 3, 4, 17, 8), (4, 33, 8), (2, 1, 1, 33, 5)), mask="bool", mask_shape=(3, 1, 17, 33), gradients=True))
@example(Call(((17, 8), (4, 33, 8), (2, 4, 33, 8)), mask="float", mask_shape=(4, 17, 33), gradients=True))
@example(Call(((3, 17, 8),) * 3, mask="float32", mask_shape=(17,), mask_gradient=True, gradients=True))
@example(Call(((2, 3, 17, 8),) * 3, mask="empty rows", mask_shape=(17, 17), options={"is_causal": True}))
@example(Call(((2, 3, 17, 8),) * 3, memory="lbhd", mask="bool", mask_shape=(17, 17), gradients=True))
@example(Call(((17, 8),) * 3, options={"enable_gqa": True}))
@given(calls())
@settings(max_examples=100)
def test_as_pytorch(fewest_read, call):
    compare(sdpa_of, call)


@pytest.mark.parametrize("mask", [None, *MASKS])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_heedful_runs_what_it_can(mask, dtype, lead):
    inputs = qkv(*lead, dtype=dtype)
    assert taken(*inputs, None if mask is None else make_mask(mask, (33, 45), dtype))


SIZES = [(1, 1), (1, 239), (113, 1), (113, 239), (239, 113), (70, 70)]


@pytest.mark.parametrize(("q_length", "k_length"), SIZES)
@pytest.mark.parametrize("mask", [None, "bool", "band", "infinite"])
def test_causal_meets_the_first_key_first(fewest_read, q_length, k_length, mask):
    shapes = ((2, 3, q_length, 8), (2, 3, k_length, 8), (2, 3, k_length, 8))
    shape = (2, 1, q_length, k_length) if mask else ()
    compare(sdpa_of, Call(shapes, mask=mask, mask_shape=shape, options={"is_causal": True}, gradients=True))


@pytest.mark.parametrize("memory", ["contiguous", "blhd", "lbhd", "packed", "strided"])
@pytest.mark.parametrize("mask", [None, "bool"])
@pytest.mark.parametrize("heads", [1, 4])
def test_memory_layout_is_pytorchs(memory, mask, heads):
    compare(sdpa_of, Call(((2, heads, 9, 8),) * 3, memory=memory, mask=mask, mask_shape=(9, 9), gradients=True))


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_causal_with_a_scale_that_is_not_positive(scale):
    """PyTorch's kernel gives NaN here; what it means is the same with a mask."""
    q, k, v = qkv(2, 3, q_length=45)
    wanted = torch_sdpa(q, k, v, torch.ones(45, 45, dtype=torch.bool).tril(), scale=scale)
    torch.testing.assert_close(sdpa_of(q, k, v, is_causal=True, scale=scale), wanted)


def test_expanded_inputs():
    q, k, v = (torch.randn(1, 1, 9, 8).expand(3, 2, 9, 8) for _ in range(3))
    torch.testing.assert_close(sdpa_of(q, k, v), torch_sdpa(q, k, v))
    assert sdpa_of(q, k, v).stride() == torch_sdpa(q, k, v).stride()


@pytest.mark.parametrize("lead", [(2, 4), (4,), ()])
@pytest.mark.parametrize("mask", [None, "band", "float"])
def test_dropout(lead, mask):
    inputs = [t.double().requires_grad_() for t in qkv(*lead, value_dim=7)]
    attn_mask = None if mask is None else make_mask(mask, (33, 45), torch.float64)
    torch.manual_seed(7)
    out = sdpa_of(*inputs, attn_mask, 0.3)
    torch.manual_seed(7)
    shape = (*((1,) * (2 - len(lead))), *lead, 33, 45)
    kept = keep_mask(draw_seed(out.device), 0.3, shape).reshape(*lead, 33, 45)
    q, k, v = inputs
    scores = q @ k.mT / 4
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).nan_to_num() * kept / 0.7
    torch.testing.assert_close(out, weights @ v)
    arriving = torch.randn_like(out)
    for mine, right in zip(*(torch.autograd.grad(y, inputs, arriving) for y in (out, weights @ v)), strict=True):
        torch.testing.assert_close(mine, right)
    torch.manual_seed(7)
    assert torch.equal(out, sdpa_of(*inputs, attn_mask, 0.3))
    assert not torch.equal(out, sdpa_of(*inputs, attn_mask, 0.3))


@pytest.mark.parametrize("mask", [None, "bool", "float", "float32"])
@pytest.mark.parametrize("lead", [(2, 4), (4,)])
def test_autocast(mask, lead):
    """Each tensor is cast by itself."""
    inputs = [t.requires_grad_() for t in qkv(*lead)]
    attn_mask = None if mask is None else make_mask(mask, (33, 45), torch.float32)
    exact = torch.autograd.grad(torch_sdpa(*inputs, attn_mask).sum(), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, theirs = sdpa_of(*inputs, attn_mask), torch_sdpa(*inputs, attn_mask)
        assert taken(*inputs, attn_mask)
        assert taken(inputs[0], inputs[1].bfloat16(), inputs[2].half(), attn_mask)
    assert out.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(out, theirs, rtol=2e-2, atol=2e-2)
    for mine, right in zip(torch.autograd.grad(out.sum(), inputs), exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, right, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("shape", [(33, 45), (4, 1, 45), (2, 4, 33, 45), (33, 1), (45,)])
def test_gradient_of_the_mask(shape):
    # PyTorch wants two dimensions of the mask of a call with four.
    lead = (4,) if len(shape) < 2 else (2, 4)
    inputs = [t.double().requires_grad_() for t in qkv(*lead)]
    mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert taken(*inputs, mask)
    found, wanted = (
        torch.autograd.grad(f(*inputs, mask).square().sum(), [*inputs, mask]) for f in (sdpa_of, torch_sdpa)
    )
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right)


def test_a_mask_changed_in_place_is_read_again():
    q, k, v = qkv(2, 3)
    mask = torch.ones(33, 45, dtype=torch.bool).tril()
    for change in (lambda: mask.triu_(-3), lambda: mask.numpy().__setitem__((slice(5, 9), 2), True), lambda: None):
        torch.testing.assert_close(sdpa_of(q, k, v, mask), torch_sdpa(q, k, v, mask))
        change()


@pytest.mark.parametrize(
    "arguments",
    [
        lambda q, k, v: (q, k.double(), v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q.cfloat(), k.cfloat(), v.cfloat()),
        lambda q, k, v: (q[0, 0, 0], k, v),
        lambda q, k, v: (q, k[:, :2], v[:, :2]),
        lambda q, k, v: (q[..., :8], k, v),
        lambda q, k, v: (q, k, v, torch.zeros(33, 45, dtype=torch.int)),
        lambda q, k, v: (q, k, v, torch.zeros(33, 45).bfloat16()),
        lambda q, k, v: (q, k, v, torch.zeros(33, 44)),
        lambda q, k, v: (q, k, v, torch.zeros(45)),
        lambda q, k, v: (q, k, v, True),
        lambda q, k, v: (q, k, v, None, None),
        lambda q, k, v: (q, k, v, None, 1.5),
        lambda q, k, v: (q, k, v, None, -0.5),
        lambda q, k, v: (q, k, v, None, 0.0, 1),
        lambda q, k, v: (q, k, None),
        lambda q, k, v: (q.numpy(), k, v),
        lambda q, k, v: (q[0], k[0], v[0], torch.zeros(33, 45), 0.0, True),
    ],
)
def test_errors_are_pytorchs(arguments):
    given = arguments(*qkv(2, 4))
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch_sdpa(*given)
    for _ in range(2):
        with pytest.raises(type(theirs.value)) as mine:
            sdpa_of(*given)
        assert str(mine.value) == str(theirs.value)


def test_unknown_and_missing_arguments():
    q, k, v = qkv(2, 4)
    for wrong in (lambda f: f(q, k), lambda f: f(q, k, v, causal=True), lambda f: f(q, k, v, None, 0.0, False, None)):
        for function in (torch_sdpa, sdpa_of):
            with pytest.raises(TypeError):
                wrong(function)


@pytest.mark.parametrize("empty", [0, 1, 2, 3])
def test_sizes_of_0(empty):
    if empty == 1 and torch.__version__ < "2.12":
        pytest.skip("PyTorch's own function divides by the number of heads there, and the process ends")
    shape = [2, 3, 5, 8]
    shape[empty] = 0
    q = torch.randn(shape)
    assert torch.equal(sdpa_of(q, q, q), torch_sdpa(q, q, q))


def test_a_head_dim_that_the_engine_does_not_take():
    inputs = qkv(2, 2, dim=520)
    assert not taken(*inputs)
    assert torch.equal(sdpa_of(*inputs), torch_sdpa(*inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_function_transforms():
    inputs, mask = qkv(3, 2, 2), make_mask("bool", (33, 45), torch.float32)
    both = [torch.vmap(lambda q, k, v, f=f: f(q, k, v, mask))(*inputs) for f in (sdpa_of, torch_sdpa)]
    torch.testing.assert_close(*both)
    seen = []
    torch.vmap(lambda q, k, v: seen.append(taken(q, k, v)) or q)(*inputs)
    assert seen == [False]
    q, k, v = qkv(2, 2)
    both = [torch.func.grad(lambda q, f=f: f(q, k, v).square().sum())(q) for f in (sdpa_of, torch_sdpa)]
    torch.testing.assert_close(*both)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_tensor_subclasses_and_modes():
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    q, k, v = qkv(2, 3)
    for bias in (causal_lower_right(33, 45), causal_upper_left(33, 45)):
        torch.testing.assert_close(sdpa_of(q, k, v, bias), torch_sdpa(q, k, v, bias))
    with Watching() as seen:
        sdpa_of(q, k, v)
    assert any("flash_attention_for_cpu" in name for name in seen.names)
    with torch.device("cpu"):
        torch.testing.assert_close(sdpa_of(q, k, v), torch_sdpa(q, k, v))


def test_meta_tensors():
    q, k, v = (t.to("meta") for t in qkv(2, 3))
    assert sdpa_of(q, k, v).shape == (2, 3, 33, 16)


def test_sdpa_kernel_is_heeded():
    inputs = qkv(4)
    assert taken(*inputs)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not taken(*inputs)
        assert torch.equal(sdpa_of(*inputs), torch_sdpa(*inputs))


@pytest.mark.parametrize("lead", [(2, 4), (4,), ()])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_compile(lead, mask):
    torch._dynamo.reset()
    inputs = [t.requires_grad_() for t in qkv(*lead)]
    attn_mask = None if mask is None else make_mask(mask, (33, 45), torch.float32)
    step = torch.compile(lambda q, k, v, m: sdpa_of(q, k, v, m, scale=0.2), fullgraph=True, backend="aot_eager")
    found, wanted = step(*inputs, attn_mask), torch_sdpa(*inputs, attn_mask, scale=0.2)
    torch.testing.assert_close(found, wanted)
    for mine, right in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, right)


def test_small_calls_are_pytorchs(monkeypatch):
    pairs = dict.fromkeys(prefer._PAIRS, 10_000)
    monkeypatch.setitem(prefer._table, "few_pairs", pairs)
    q, k, v = qkv(2, 2)
    assert attend(q, k, v, None, 0.0, False, None, False) is sdpa.call.SMALL
    assert torch.equal(sdpa_of(q, k, v), torch_sdpa(q, k, v))
    assert not isinstance(attend(q, k, v, None, 0.1, False, None, False), str)
    assert torch.equal(sdpa_of(q, k, v, is_causal=True), torch_sdpa(q, k, v, is_causal=True))
    heedful.clear_caches()
    assert not sdpa.call._small


def test_tiny_masked_calls_without_a_kernel_are_pytorchs(monkeypatch):
    monkeypatch.setattr(sdpa.call, "_FEW_MASKED_PAIRS", 10_000)
    inputs, mask = qkv(2), make_mask("bool", (33, 45), torch.float32)
    assert attend(*inputs, mask, 0.0, False, None, False) is sdpa.call.SMALL
    inputs = [t.requires_grad_() for t in inputs]
    assert taken(*inputs, mask)


def dense(pattern, q_length, k_length):
    return (heedful.Full() if pattern is None else pattern).dense(q_length, k_length)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_masks_are_recognised(dtype):
    ones = torch.ones(113, 239, dtype=torch.bool)
    lengths = torch.tensor([239, 100, 7])[:, None, None, None]
    padding = torch.arange(239) < lengths
    left = torch.arange(239) >= 239 - lengths
    cases = {
        "None": ones[None, None],
        "Causal(offset=0)": ones.tril()[None, None],
        "Causal(offset=126)": ones.tril(126)[None, None],
        "SlidingWindow(10, 0, offset=0)": ones.tril().triu(-10)[None, None],
        "SlidingWindow(7, 4, offset=0)": ones.tril(4).triu(-7)[None, None],
        "SlidingWindow(0, 9, offset=3)": ones.triu(3).tril(12)[None, None],
        "Padding": padding,
        "Causal(offset=0) & Padding": padding & ones.tril(),
        "SlidingWindow(9, 0, offset=0) & Padding": left & ones.tril().triu(-9),
        "SlidingWindow(10, 0, offset=0)  ": ones.tril().triu(-10)[None, None].expand(3, 4, -1, -1),
    }
    for name, pairs in cases.items():
        mask = pairs if dtype == torch.bool else torch.zeros(pairs.shape).masked_fill(~pairs, -math.inf).to(dtype)
        pattern, bias = masks.read_mask(mask, 113, 239)
        assert bias is None
        assert repr(pattern).startswith(name.split(" &")[0].strip())
        assert (" & " in name) == (" & " in repr(pattern))
        assert ("Padding" in name) == ("Padding" in repr(pattern))
        assert torch.equal(
            dense(pattern, 113, 239).expand(pairs.shape[0], pairs.shape[1], 113, 239), pairs.expand(-1, -1, 113, -1)
        )


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("per_item", [False, True])
def test_other_masks_are_read_by_tiles(dtype, per_item):
    length = 300
    document = torch.arange(length) // 70
    pairs = (document[:, None] == document)[None, None]
    if per_item:
        pairs = torch.cat([pairs, pairs.flip(2)], 0)
    mask = pairs if dtype == torch.bool else torch.zeros(pairs.shape, dtype=dtype).masked_fill(~pairs, -math.inf)
    pattern, bias = masks.read_mask(mask, length, length)
    assert bias is None
    assert repr(pattern).startswith("BlockSparse(")
    assert torch.equal(pattern.dense(length, length), pairs)
    calls = Call(((2, 3, length, 8),) * 3)
    q, k, v = calls.tensors()[0]
    torch.testing.assert_close(
        sdpa_of(q, k, v, mask.to(q.dtype) if dtype != torch.bool else mask), torch_sdpa(q, k, v, pairs)
    )


@pytest.mark.parametrize("kind", ["bool", "band", "infinite", "float"])
@pytest.mark.parametrize("lead", [(2, 3), (3,)])
def test_a_transposed_mask(kind, lead):
    q, k, v = qkv(*lead)
    mask = make_mask(kind, (45, 33), torch.float32).mT
    assert taken(q, k, v, mask)
    torch.testing.assert_close(sdpa_of(q, k, v, mask), torch_sdpa(q, k, v, mask))


def test_a_bias_stays_one():
    for mask in (torch.randn(1, 1, 300, 300), torch.full((1, 1, 300, 300), -1e9).tril(-1)):
        pattern, bias = masks.read_mask(mask, 300, 300)
        assert pattern is None
        assert bias is mask


@pytest.mark.parametrize("least", [-math.inf, torch.finfo(torch.float32).min, -1e30, -1e9, -1e4])
def test_very_negative_numbers(least):
    """Those that no score makes up for exclude a pair; a row of nothing else weighs all keys alike, as in PyTorch."""
    q, k, v = qkv(2, 3, q_length=45)
    mask = torch.zeros(45, 45).masked_fill(~torch.ones(45, 45, dtype=torch.bool).tril(), least)
    assert (masks.read_mask(mask[None, None], 45, 45)[1] is None) == (least <= -1e30)
    torch.testing.assert_close(sdpa_of(q, k, v, mask), torch_sdpa(q, k, v, mask))
    mask[7] = least
    assert masks.read_mask(mask[None, None], 45, 45)[1] is not None
    inputs = [t.requires_grad_() for t in (q, k, v)]
    found, wanted = sdpa_of(*inputs, mask), torch_sdpa(*inputs, mask)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    # The gradients of such a row are beyond what a log-sum-exp holds, PyTorch's own too; none of them is infinite, and
    # where nothing arrives there they touch no other.
    arriving = torch.randn_like(found)
    assert all(g.isfinite().all() for g in torch.autograd.grad(found, inputs, arriving, retain_graph=True))
    arriving[:, :, 7] = 0
    for mine, right in zip(*(torch.autograd.grad(y, inputs, arriving) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)


def test_keys_that_are_masked_everywhere_may_hold_anything():
    q, k, v = qkv(2, 3)
    mask = torch.arange(45) < 30
    clean = sdpa_of(q, k, v, mask[None])
    k[:, :, 30:], v[:, :, 30:] = math.nan, math.inf
    assert torch.equal(sdpa_of(q, k, v, mask[None]), clean)


def test_a_row_without_a_key_is_0():
    q, k, v = qkv(2, 3)
    mask = torch.ones(33, 45, dtype=torch.bool)
    mask[4] = False
    for attn_mask in (mask, torch.zeros(33, 45).masked_fill(~mask, -math.inf)):
        for function in (sdpa_of, torch_sdpa):
            assert (function(q, k, v, attn_mask)[:, :, 4] == 0).all()


def test_outcome_notices_a_difference():
    """The comparison that all of this rests on."""
    call = Call(((2, 3, 17, 8),) * 3, mask="bool", mask_shape=(17, 17), gradients=True)
    for wrong in (
        lambda q, k, v, m, **o: torch_sdpa(q, k, v, m, **o) + 1e-3,
        lambda q, k, v, m, **o: torch_sdpa(q, k, v, **o),
        lambda q, k, v, m, **o: torch_sdpa(q.detach(), k, v, m, **o) + 0 * q,
        lambda q, k, v, m, **o: torch_sdpa(q, k, v, m, **o).transpose(1, 2).contiguous().transpose(1, 2),
        lambda q, k, v, m, **o: 1 / 0,
    ):
        with pytest.raises(AssertionError):
            compare(wrong, call)
    assert outcome(torch_sdpa, call).error is None

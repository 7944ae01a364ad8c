"""The front door: what is chosen, that it is said, and that a remembered choice is never the wrong one."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from inputs import attention_inputs
from torch.autograd import forward_ad

import heedful
from heedful import (
    Attention,
    Causal,
    Documents,
    Full,
    Mask,
    Padding,
    SlidingWindow,
    UnsupportedError,
    api,
    attention,
    choose,
    explain,
)

NATIVE = "native" not in choose.UNAVAILABLE


@pytest.fixture(autouse=True)
def _nothing_remembered():
    heedful.clear_caches()
    choose._logged.clear()
    yield
    heedful.clear_caches()


def test_public_names() -> None:
    for name in heedful.__all__:
        assert getattr(heedful, name) is not None
        assert name in dir(heedful)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        heedful.nothing  # noqa: B018
    assert set(heedful._HOME) | {"__version__"} == set(heedful.__all__)


def test_import_loads_no_torch() -> None:
    code = "import sys, heedful; heedful.Causal(); assert 'torch' not in sys.modules; heedful.attention; import torch"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_result_is_a_tensor_or_a_named_tuple() -> None:
    q, k, v = attention_inputs()
    assert isinstance(attention(q, k, v), torch.Tensor)
    for _ in range(2):
        got = attention(q, k, v, return_lse=True)
        assert isinstance(got, Attention)
        assert got.weights is None
    got = attention(q, k, v, return_weights=True)
    assert got.lse is None
    assert got.weights.shape == (2, 4, 7, 9)
    out, lse, weights = attention(q, k, v, return_lse=True, return_weights=True)
    assert out.shape == (2, 4, 7, 16)
    torch.testing.assert_close(lse, (q @ k.mT / 4).logsumexp(-1))
    torch.testing.assert_close(weights, (q @ k.mT / 4).softmax(-1))


def test_causal_with_a_pattern_is_both() -> None:
    q, k, v = attention_inputs()
    both = attention(q, k, v, pattern=SlidingWindow(2) & Causal())
    for _ in range(2):
        assert torch.equal(attention(q, k, v, pattern=SlidingWindow(2), causal=True), both)
    assert torch.equal(attention(q, k, v, causal=True), attention(q, k, v, pattern=Causal()))


def test_bool_tensor_is_mask() -> None:
    q, k, v = attention_inputs()
    mask = torch.rand(7, 9) > 0.4
    assert torch.equal(attention(q, k, v, pattern=mask), attention(q, k, v, pattern=Mask(mask)))


def test_backend_by_name() -> None:
    q, k, v = attention_inputs()
    assert explain(q, k, v, backend="reference").backend == "reference"
    assert torch.equal(attention(q, k, v, backend="sdpa"), F.scaled_dot_product_attention(q, k, v))
    with pytest.raises(UnsupportedError, match="softcap") as raised:
        attention(q, k, v, softcap=2.0, backend="sdpa")
    assert raised.value.reasons == {"sdpa": ["does not support softcap"]}


def test_unsupported_has_reasons_of_every_backend() -> None:
    q, k, v = (t.unsqueeze(1) for t in attention_inputs())
    with pytest.raises(
        UnsupportedError, match='reference does not support return_weights="sparse" under vmap'
    ) as raised:
        torch.vmap(lambda q, k, v: attention(q, k, v, return_weights="sparse").out)(q, k, v)
    assert set(raised.value.reasons) == {status.name for status in heedful.list_backends()}
    assert all(raised.value.reasons.values())


def test_zero_sizes_are_refused_where_the_call_would_be() -> None:
    q, k, v = attention_inputs(k_length=0)
    assert (attention(q, k, v, backend="sdpa") == 0).all()
    with pytest.raises(UnsupportedError, match="softcap"):
        attention(q, k, v, softcap=2.0, backend="sdpa")


def test_list_backends() -> None:
    statuses = {status.name: status for status in heedful.list_backends()}
    assert list(statuses) == ["native", "triton", "sdpa", "reference"]
    assert statuses["sdpa"].available
    assert statuses["reference"].reason is None
    assert statuses["native"].available == (statuses["native"].reason is None)


def test_explain_shows_every_backend() -> None:
    q, k, v = attention_inputs(kv_heads=2, value_dim=8)
    q.requires_grad_()
    found = explain(q, k, v, pattern=SlidingWindow(3), softcap=2.0)
    assert found.backend == ("native" if NATIVE else "reference")
    assert found.reasons["sdpa"] == ["does not support softcap"]
    assert found.reasons["reference"] == []
    text = str(found)
    for part in (
        "4 heads sharing 2", "7 queries, 9 keys", "value dim 8", "SlidingWindow(3", "float32 on cpu",
        "gradient, softcap", f"{100 * SlidingWindow(3).density(7, 9):.3g} %",
    ):  # fmt: skip
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith(("backend", "native", "sdpa", "reference"))]
    verdicts = ("verdict", *(("runs", "cannot", "could") if NATIVE else ("cannot", "cannot", "runs")))
    assert len({line.index(verdict) for line, verdict in zip(rows, verdicts, strict=True)}) == 1


def test_explain_says_what_runs_dense_and_what_is_cast() -> None:
    q, k, v = attention_inputs()
    assert any("bool mask" in note for note in explain(q, k, v, pattern=Padding(0, 3), backend="sdpa").notes)
    assert any("a kept float" in note for note in explain(q, k, v, pattern=SlidingWindow(3), backend="sdpa").notes)
    assert any("float mask" in note for note in explain(q, k, v, bias=torch.zeros(9), backend="sdpa").notes)
    assert not any("mask" in note for note in explain(q, k, v, backend="sdpa").notes)
    with torch.autocast("cpu"):
        found = explain(q, k, v)
    assert found.problem.dtype == torch.bfloat16
    assert any("autocast" in note for note in found.notes)
    assert any("nothing to compute" in note for note in explain(q[:0], k[:0], v[:0]).notes)


def test_explain_of_what_cannot_run() -> None:
    q, k, v = attention_inputs()
    found = explain(q, k, v, softcap=2.0, backend="sdpa")
    assert found.backend is None
    assert "cannot" in str(found)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        explain(q, k, v, mask=None)


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
def test_slower_road_is_logged_once_for_each_kind(caplog) -> None:
    q, k, v = attention_inputs(head_dim=520)
    with caplog.at_level(logging.WARNING, "heedful"):
        for _ in range(2):
            attention(q, k, v, softcap=2.0)
            attention(q[:, :, :3], k, v, softcap=3.0)
        assert [record.getMessage().split(" (said")[0] for record in caplog.records] == [
            "attention runs on reference instead of native: takes a head dim up to 512, not 520; takes a value dim up "
            "to 512, not 520; everything runs dense: fp64 matrices of 7 x 9 for every batch item and head, for "
            "checking, not speed"
        ]
        attention(q, k, v)
        assert len(caplog.records) == 2
        assert caplog.records[1].getMessage().startswith("attention runs on sdpa instead of native")
        attention(q, k, v, softcap=2.0, backend="reference")
        explain(q, k, v, softcap=2.0, sinks=torch.zeros(4))
        assert len(caplog.records) == 2


EVERYTHING = {"softcap": 2.0, "dropout_p": 0.1, "return_lse": True, "pattern": SlidingWindow(5)}


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
@pytest.mark.parametrize("return_weights", [False, True, "sparse"])
def test_the_engine_runs_every_feature_without_a_word(caplog, return_weights) -> None:
    q, k, v = (t.requires_grad_() for t in attention_inputs(q_length=100, k_length=100))
    extras = {"bias": torch.randn(100), "alibi_slopes": torch.rand(4), "sinks": torch.randn(4)}
    options = EVERYTHING | extras | {"return_weights": return_weights}
    found = explain(q, k, v, **options)
    assert found.backend == "native"
    assert found.reasons["native"] == found.reasons["reference"] == []
    with caplog.at_level(logging.WARNING, "heedful"):
        attention(q, k, v, **options).out.sum().backward()
    assert not caplog.records


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
def test_a_choice_by_measurement_is_said() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in attention_inputs())
    assert explain(q, k, v).notes == ["sdpa is measured to be faster than native for such a call"]
    assert explain(q, k, v, backend="sdpa").notes == ["backend='sdpa' was asked for"]
    assert explain(q[:0], k[:0], v[:0]).notes == ["there is nothing to compute: the result is zero or has no elements"]


def test_what_the_engine_cannot_do_is_named() -> None:
    q, k, v = attention_inputs(head_dim=520)
    q.requires_grad_()
    found = explain(q, k, v, return_weights=True)
    assert found.backend == "reference"
    assert found.reasons["sdpa"] == ["does not support return_weights"]
    if NATIVE:
        assert found.reasons["native"] == [f"takes a {what} dim up to 512, not 520" for what in ("head", "value")]


def test_second_call_takes_the_short_way(monkeypatch) -> None:
    q, k, v = attention_inputs(q_length=9)
    options = [{}, {"causal": True}, {"scale": 0.3}, {"layout": "blhd"}]
    if NATIVE:
        patterns = SlidingWindow(2), Mask(torch.rand(9, 9) > 0.5)
        options += [{"pattern": pattern, "backend": "native", "return_lse": True} for pattern in patterns]
        bias = {"bias": torch.randn(9, 9)}, {"bias": torch.randn(1, 4, 1, 9), "layout": "blhd"}
        slopes = {"alibi_slopes": torch.rand(4)}, {"alibi_slopes": torch.rand(2, 4), "softcap": 2.0}
        sinks = {"sinks": torch.nn.Parameter(torch.randn(4)), "pattern": patterns[1]}
        options += [*bias, *slopes, sinks, {"return_weights": True}, {"return_weights": "sparse"}]

    def call(option):
        tensors = [t.transpose(1, 2) for t in (q, k, v)] if option.get("layout") == "blhd" else (q, k, v)
        got = attention(*tensors, **option)
        return got if isinstance(got, Attention) else (got,)

    first = [call(option) for option in options]
    monkeypatch.setattr(api, "prepare", None)
    for option, want in zip(options, first, strict=True):
        for mine, theirs in zip(call(option), want, strict=True):
            if mine is None or theirs is None:
                assert mine is theirs
            else:
                assert mine.is_sparse == theirs.is_sparse
                assert torch.equal(mine.to_dense(), theirs.to_dense())


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
@pytest.mark.parametrize("option", [{}, {"return_lse": True}, {"pattern": Mask(torch.rand(9, 9) > 0.5)}, {"bias": 1}])
@pytest.mark.parametrize("layout", ["bhld", "blhd"])
def test_second_call_for_gradients_takes_the_short_way(monkeypatch, option, layout) -> None:
    q, k, v = (t.transpose(1, 2) if layout == "blhd" else t for t in attention_inputs(q_length=9))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    option = option | {"layout": layout, "backend": "native"}
    if "bias" in option:
        option["bias"] = torch.randn(4, 9, 1, requires_grad=True)
        leaves.append(option["bias"])

    def call():
        got = attention(q, k, v, **option)
        loss = (got.out.square().sum() + got.lse.sum()) if isinstance(got, Attention) else got.square().sum()
        return torch.autograd.grad(loss, leaves)

    first = call()
    monkeypatch.setattr(api, "prepare", None)
    for mine, theirs in zip(call(), first, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.stride() == theirs.stride()


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
def test_what_is_remembered_follows_bias_slopes_and_sinks() -> None:
    q, k, v = attention_inputs(q_length=9)
    row, whole = torch.randn(9), torch.randn(4, 9, 9)
    variants = [
        {"bias": row}, {"bias": whole}, {"bias": whole.requires_grad_()}, {"bias": row[None].expand(9, 9)},
        {"sinks": torch.randn(4)}, {"sinks": torch.randn(4), "bias": row}, {"alibi_slopes": torch.rand(4)},
        {"alibi_slopes": torch.rand(2, 4)}, {"alibi_slopes": torch.rand(4).requires_grad_()}, {},
    ]  # fmt: skip
    fresh = []
    for options in variants:
        heedful.clear_caches()
        fresh.append(attention(q, k, v, backend="native", **options))
    for _ in range(2):
        for options, want in zip(variants, fresh, strict=True):
            got = attention(q, k, v, backend="native", **options)
            assert torch.equal(got, want)
            assert got.requires_grad == want.requires_grad
    for bad in (whole.double(), whole[:, :4], whole > 0):
        with pytest.raises((TypeError, ValueError), match=r"bias takes .*, got"):
            attention(q, k, v, backend="native", bias=bad)


def test_what_is_remembered_depends_on_every_argument() -> None:
    q, k, v = attention_inputs(q_length=9)
    variants = [
        {}, {"causal": True}, {"scale": 0.3}, {"softcap": 1.0}, {"pattern": SlidingWindow(1)},
        {"pattern": SlidingWindow(2)}, {"pattern": SlidingWindow(1, 0)}, {"backend": "reference"},
        {"return_lse": True}, {"pattern": SlidingWindow(1), "causal": True},
    ]  # fmt: skip
    fresh = []
    for options in variants:
        heedful.clear_caches()
        fresh.append(attention(q, k, v, **options))
    for _ in range(2):
        for options, want in zip(variants, fresh, strict=True):
            got = attention(q, k, v, **options)
            assert type(got) is type(want)
            assert torch.equal(got.out, want.out) if isinstance(got, Attention) else torch.equal(got, want)


def test_what_is_remembered_follows_grad_mode() -> None:
    q, k, v = attention_inputs(q_length=100, k_length=100)
    for _ in range(2):
        assert attention(q, k, v).grad_fn is None
        with torch.no_grad():
            assert attention(q.requires_grad_(), k, v).grad_fn is None
        assert attention(q, k, v).grad_fn is not None
        with torch.inference_mode():
            assert attention(q, k, v).is_inference()
        q.requires_grad_(False)
        assert attention(q, k.requires_grad_(), v).grad_fn is not None
        assert attention(q, k.requires_grad_(False), v.requires_grad_()).grad_fn is not None
        v.requires_grad_(False)


def test_what_is_remembered_follows_dtype_and_device() -> None:
    q, k, v = attention_inputs()
    for _ in range(2):
        assert attention(q, k, v).dtype == torch.float32
        assert attention(q.half(), k.half(), v.half()).dtype == torch.float16
        assert attention(q.to("meta"), k.to("meta"), v.to("meta")).device.type == "meta"


def test_what_is_remembered_follows_transforms() -> None:
    q, k, v = attention_inputs(dtype=torch.float64)
    tangent = torch.randn_like(q)
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(attention(leaf, k, v).square().sum(), leaf)
    for _ in range(2):
        attention(q, k, v)
        torch.testing.assert_close(torch.func.grad(lambda q: attention(q, k, v).square().sum())(q), want)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, tangent), k, v))
        _, pushed = torch.func.jvp(lambda q: attention(q, k, v), (q,), (tangent,))
        torch.testing.assert_close(dual.tangent, pushed)
        torch.testing.assert_close((pushed * 2 * attention(q, k, v)).sum(), (want * tangent).sum())
        each = torch.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)
        torch.testing.assert_close(each, attention(q, k, v))


@pytest.mark.parametrize("loss", [torch.sum, lambda out: out.square().sum()])
@pytest.mark.parametrize("backend", [None, "native", "reference"])
def test_double_backward_works_or_is_refused_by_name(backend, loss) -> None:
    q, k, v = (t.requires_grad_() for t in attention_inputs(dtype=torch.float64))
    message = {None: "derivative for .* is not implemented", "native": 'backend="reference" has derivatives of any'}
    for _ in range(2):
        (gradient,) = torch.autograd.grad(loss(attention(q, k, v, backend=backend)), q, create_graph=True)
        assert gradient.requires_grad
        if backend == "reference":
            assert torch.autograd.grad(gradient.sum(), q)[0].isfinite().all()
        else:
            # Beside other terms, a gradient that is taken for a constant would give a wrong result in silence.
            with pytest.raises(RuntimeError, match=message[backend]):
                torch.autograd.grad(gradient.square().sum() + q.sum(), q)


@pytest.mark.skipif(not NATIVE, reason="the engine is not built")
def test_derivatives_of_torch_func() -> None:
    q, k, v = attention_inputs(q_length=100, k_length=100, dtype=torch.float64)
    features = {"softcap": 2.0, "sinks": torch.randn(4).double(), "return_weights": True, "return_lse": True}

    def loss(q, **options):
        found = attention(q, k, v, causal=True, **features, **options)
        return found.out.square().sum() + found.lse.sum() + found.weights.square().sum()

    torch.testing.assert_close(
        torch.func.grad(lambda q: loss(q, backend="native"))(q),
        torch.func.grad(lambda q: loss(q, backend="reference"))(q),
    )
    # Derivatives of derivatives: by torch.func twice, and by autograd of what torch.func records.
    with pytest.raises(UnsupportedError, match=r"native does not support derivatives of torch\.func's derivatives"):
        torch.func.grad(lambda q: torch.func.grad(lambda q: loss(q, backend="native"))(q).sum())(q)
    with pytest.raises(UnsupportedError, match=r"native does not support derivatives of torch\.func's derivatives"):
        torch.func.grad(lambda q: loss(q, backend="native"))(q.clone().requires_grad_())
    twice = torch.func.grad(lambda q: torch.func.grad(loss)(q).square().sum())(q[:, :, :5])
    leaf = q[:, :, :5].clone().requires_grad_()
    (once,) = torch.autograd.grad(loss(leaf, backend="reference"), leaf, create_graph=True)
    torch.testing.assert_close(twice, torch.autograd.grad(once.square().sum(), leaf)[0])


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_sparse_weights(backend) -> None:
    q, k, v = attention_inputs(kv_heads=2)
    bias = torch.randn(7, 9)
    bias[2, 3], bias[4] = -torch.inf, -torch.inf
    options = {"pattern": SlidingWindow(2), "bias": bias, "backend": backend}
    for _ in range(2):
        dense = attention(q, k, v, return_weights=True, **options)
        sparse = attention(q, k, v, return_weights="sparse", **options)
        assert torch.equal(sparse.out, dense.out)
        assert sparse.weights.is_coalesced()
        assert torch.equal(sparse.weights.to_dense(), dense.weights)
        attended = (SlidingWindow(2).dense(7, 9) & (bias != -torch.inf)).expand(2, 4, 7, 9)
        assert torch.equal(sparse.weights.indices(), attended.nonzero().T)
        again = torch.sparse_coo_tensor(
            sparse.weights.indices(), sparse.weights.values(), (2, 4, 7, 9), check_invariants=False
        ).coalesce()
        assert torch.equal(again.indices(), sparse.weights.indices())


def test_what_is_remembered_reads_operands_anew() -> None:
    q, k, v = attention_inputs(q_length=9)
    stop = torch.tensor([9, 4], dtype=torch.int32)
    pattern = Padding(torch.tensor([0, 0], dtype=torch.int32), stop)
    first = attention(q, k, v, pattern=pattern)
    stop[1] = 6
    assert torch.equal(attention(q, k, v, pattern=pattern)[0], first[0])
    torch.testing.assert_close(attention(q, k, v, pattern=pattern)[1], attention(q, k[:, :, :6], v[:, :, :6])[1])


def test_contents_are_checked_on_every_call() -> None:
    q, k, v = attention_inputs(q_length=9)
    for _ in range(2):
        attention(q, k, v, pattern=Documents(torch.tensor([0, 4, 9])))
        with pytest.raises(ValueError, match=r"cu_q .* 9 here, got 8"):
            attention(q, k, v, pattern=Documents(torch.tensor([0, 4, 8])))


def test_memory_of_choices_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(api, "_MAX_SHORTCUTS", 8)
    q, k, v = attention_inputs()
    for length in range(1, 30):
        attention(q, k.new_ones(2, 4, length, 16), v.new_ones(2, 4, length, 16))
        assert len(api._shortcuts) <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [3, 100])
def test_autocast_casts_as_sdpa(dtype, size) -> None:
    q, k, v = attention_inputs(q_length=size, k_length=size, dtype=dtype)
    for _ in range(2):
        before = attention(q, k, v, causal=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = attention(q, k, v, causal=True)
            want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            with torch.autocast("cpu", enabled=False):
                assert torch.equal(attention(q, k, v, causal=True), before)
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        assert torch.equal(attention(q, k, v, causal=True), before)


def test_autocast_casts_mixed_inputs_and_leaves_the_bias() -> None:
    q, k, v = attention_inputs()
    bias = torch.randn(7, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attention(q.requires_grad_(), k.bfloat16(), v.half(), bias=bias)
    assert got.dtype == torch.bfloat16
    assert torch.autograd.grad(got.sum(), q)[0].dtype == torch.float32


def test_arguments_are_left_as_they_were() -> None:
    q, k, v = attention_inputs(q_length=100, k_length=100)
    bias, mask = torch.randn(100, 100), torch.rand(100, 100) > 0.5
    mask[3] = False
    copies = [t.clone() for t in (q, k, v, bias, mask)]
    for name in ("native", "sdpa", "reference"):
        if name not in choose.UNAVAILABLE:
            attention(q, k, v, backend=name, pattern=mask, bias=bias)
    assert all(torch.equal(t, copy) for t, copy in zip((q, k, v, bias, mask), copies, strict=True))


def test_full_pattern_is_no_pattern() -> None:
    q, k, v = attention_inputs()
    assert torch.equal(attention(q, k, v), attention(q, k, v, pattern=Full()))


def test_parameters_and_other_subclasses_of_tensor() -> None:
    q, k, v = attention_inputs(q_length=100, k_length=100)
    got = attention(torch.nn.Parameter(q), k, v)
    assert got.grad_fn is not None
    torch.testing.assert_close(got, attention(q, k, v))

"""heedful.nn.MultiheadAttention against torch.nn.MultiheadAttention, in double, where both must agree to rounding."""

from __future__ import annotations

import copy
import math

import attention_calls
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import pattern_examples
from multihead_inputs import EMBED, HEADS, excluding, masks, pair, sequences
from torch import Tensor, nn

import heedful
from heedful import Causal, Global, Mask, SlidingWindow
from heedful.nn import MultiheadAttention

MODULES = {
    "plain": {},
    "without bias": {"bias": False},
    "other sizes": {"kdim": 10, "vdim": 14},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 10, "vdim": 14},
}
INPUTS = ("sequence first", "batch first", "no batch")
ATTENTION_MASKS = (None, "bool", "bool per head", "float", "float per head")
PADDING_MASKS = (None, "bool", "float")


def results(module: nn.Module, tensors: list[Tensor], **options) -> dict[str, Tensor | None]:
    """Outputs, and gradients through all of them of inputs, float masks and parameters."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    masks = {name: value.detach() for name, value in options.items() if isinstance(value, Tensor)}
    leaves += [mask.requires_grad_() for mask in masks.values() if mask.is_floating_point()]
    module.zero_grad()
    out, weights = module(*leaves[:3], **options | masks)
    torch.manual_seed(1)
    loss = (out * torch.randn(out.shape, dtype=out.dtype)).sum()
    if weights is not None:
        loss = loss + (weights * torch.randn(weights.shape, dtype=out.dtype)).sum()
    loss.backward()
    found = {"out": out, "weights": weights} | {f"gradient {n}": leaf.grad for n, leaf in enumerate(leaves)}
    return found | {f"gradient of {name}": p.grad for name, p in module.named_parameters()}


def assert_same(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if value is None:
            assert found[name] is None, name
        else:
            close = {"rtol": 1e-9, "atol": 1e-10, "msg": lambda text, n=name: f"{n}: {text}"}
            torch.testing.assert_close(found[name], value, **close)


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
def test_parameters_are_the_same_and_drawn_the_same_way(options) -> None:
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    torch.manual_seed(5)
    ours = MultiheadAttention(EMBED, HEADS, **options, pattern=SlidingWindow(2))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.MultiheadAttention)


@pytest.mark.parametrize("padding", PADDING_MASKS)
@pytest.mark.parametrize("attention", ATTENTION_MASKS)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_outputs_weights_and_gradients(options, kind, attention, padding) -> None:
    theirs, ours = pair(batch_first=kind == "batch first", **options)
    tensors, given = sequences(theirs, kind), masks(attention, padding, kind)
    for need_weights, average in ((False, True), (True, True), (True, False)):
        asked = given | {"need_weights": need_weights, "average_attn_weights": average}
        assert_same(results(ours, tensors, **asked), results(theirs, tensors, **asked))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("shared", ["key and value", "all"])
def test_shared_inputs(shared, kind, need_weights) -> None:
    theirs, ours = pair(batch_first=kind == "batch first")
    query, key, _ = sequences(theirs, kind, q_length=7)

    def run(module: nn.Module) -> list[Tensor]:
        x, y = query.clone().requires_grad_(), key.clone().requires_grad_()
        out, _ = module(x, x, x, need_weights=need_weights) if shared == "all" else module(x, y, y, None, need_weights)
        leaves = [x, *module.parameters()] if shared == "all" else [x, y, *module.parameters()]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    for a, b in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(query, query, query), theirs(query, query, query), rtol=1e-9, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 2, 3, 17, 65])] * 2, st.integers(1, 3)),
    kind=st.sampled_from(INPUTS),
    options=st.sampled_from(list(MODULES.values())),
    attention=st.sampled_from(ATTENTION_MASKS),
    padding=st.sampled_from(PADDING_MASKS),
    asked=st.fixed_dictionaries({"need_weights": st.booleans(), "average_attn_weights": st.booleans()}),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_any_call(sizes, kind, options, attention, padding, asked, training, seed) -> None:
    torch.manual_seed(seed)
    theirs, ours = pair(batch_first=kind == "batch first", **options)
    theirs.train(training), ours.train(training)
    lengths = dict(zip(("q_length", "k_length", "batch"), sizes, strict=True))
    given = masks(attention, padding, kind, **lengths) | asked
    tensors = sequences(theirs, kind, **lengths)
    with torch.no_grad():
        wanted, found = theirs(*tensors, **given), ours(*tensors, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("index", range(len(pattern_examples(3, HEADS, 5, 7))))
@pytest.mark.parametrize("kind", ["sequence first", "batch first"])
def test_a_pattern_is_a_mask_more(kind, index) -> None:
    pattern = pattern_examples(3, HEADS, 5, 7)[index]
    theirs, ours = pair(batch_first=kind == "batch first")
    tensors, given = sequences(theirs, kind), masks("bool", "bool", kind)
    allowed = pattern.dense(5, 7).expand(3, HEADS, 5, 7)
    excluded = (~allowed | given["attn_mask"]).flatten(0, 1)
    seen = (~excluded.view(3, HEADS, 5, 7) & ~given["key_padding_mask"][:, None, None]).any(-1)
    # torch gives NaN to rows that see nothing, which zeros stand for here.
    rows = seen.all(1)[..., None] if kind == "batch first" else seen.all(1).T[..., None]
    wanted, wanted_weights = theirs(
        *tensors, attn_mask=excluded, key_padding_mask=given["key_padding_mask"], average_attn_weights=False
    )
    options = [{"own": pattern, "called": None}, {"own": None, "called": pattern}, {"own": pattern, "called": pattern}]
    for option in options:
        ours.pattern = option["own"]
        out, weights = ours(*tensors, **given, average_attn_weights=False, pattern=option["called"])
        torch.testing.assert_close(out.where(rows, 0.0), wanted.where(rows, 0.0), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(weights, wanted_weights.nan_to_num(0.0), rtol=1e-9, atol=1e-10)


def test_the_patterns_of_module_and_call_hold_together() -> None:
    _, ours = pair(pattern=SlidingWindow(1))
    tensors = sequences(ours, "sequence first")
    found = ours(*tensors, pattern=Causal())
    ours.pattern = SlidingWindow(1, 0)
    torch.testing.assert_close(found, ours(*tensors), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pattern", [Causal(), SlidingWindow(1), Causal() & Global(2), Mask(torch.rand(5, 7) < 0.5)])
def test_appended_keys_are_seen_beside_any_pattern(pattern) -> None:
    theirs, ours = pair(add_bias_kv=True, add_zero_attn=True, batch_first=True)
    tensors = sequences(theirs, "batch first")
    wanted = results(theirs, tensors, attn_mask=~pattern.dense(5, 7)[0, 0])
    assert_same(results(ours, tensors, pattern=pattern), wanted)


def test_the_causal_hint(monkeypatch) -> None:
    calls = attention_calls.record(monkeypatch)
    theirs, ours = pair(batch_first=True)
    tensors = sequences(theirs, "batch first", q_length=9)
    padding = masks(None, "bool", "batch first")["key_padding_mask"]
    # What the mask says counts where torch looks at it: with weights, or beside a padding mask.
    for mask in (torch.ones(9, 7, dtype=torch.bool).triu(1), torch.zeros(9, 7).double(), excluding((9, 7), "bool")):
        for options in ({"need_weights": False}, {}, {"need_weights": False, "key_padding_mask": padding}):
            if mask.is_floating_point() and "key_padding_mask" in options:
                continue
            asked = {"attn_mask": mask, "is_causal": True} | options
            assert_same(results(ours, tensors, **asked), results(theirs, tensors, **asked))
    assert [call["pattern"] == Causal(0) for call in calls] == [True, False, False, True, False, True, False, False]
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        ours(*tensors, is_causal=True)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=["learned key", "zero key"])
def test_the_causal_hint_leaves_appended_keys_in_sight(options) -> None:
    theirs, ours = pair(batch_first=True, **options)
    query, _, _ = sequences(theirs, "batch first")
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wanted = theirs(query, query, query, attn_mask=causal)[0]
    for need_weights in (False, True):
        found = ours(query, query, query, attn_mask=causal, is_causal=True, need_weights=need_weights)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def test_bool_masks_arrive_as_what_counts_and_float_masks_as_a_bias(monkeypatch) -> None:
    calls = attention_calls.record(monkeypatch)
    _, ours = pair(batch_first=True)
    tensors = sequences(ours, "batch first")
    ours(*tensors, **masks("bool", None, "batch first"))
    ours(*tensors, **masks(None, "bool", "batch first"), need_weights=False)
    ours(*tensors, **masks("float", "bool", "batch first"))
    ours(*tensors, **masks("float", "float", "batch first"))
    assert [isinstance(call["pattern"], torch.Tensor) for call in calls] == [True, True, True, False]
    assert [call["bias"] is None for call in calls] == [True, True, False, False]
    assert [call["return_weights"] for call in calls] == [True, False, True, True]
    assert calls[1]["pattern"].shape == (3, 1, 1, 7)


@pytest.mark.parametrize("batch_first", [False, True])
def test_projections_reach_attention_uncopied(monkeypatch, batch_first) -> None:
    calls = attention_calls.record(monkeypatch)
    ours = MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    x, y = torch.randn(3, 5, EMBED), torch.randn(3, 5, EMBED)
    ours(x, x, x), ours(x, y, y)
    one, two = ([calls[n][name].untyped_storage().data_ptr() for name in "qkv"] for n in range(2))
    assert one[0] == one[1] == one[2]
    assert two[0] != two[1] == two[2]
    assert ours(x, x, x)[0].is_contiguous()


def test_queries_without_keys_give_zeros() -> None:
    _, ours = pair(batch_first=True)
    query, key, value = (tensor.requires_grad_() for tensor in sequences(ours, "batch first"))
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[2] = True
    for need_weights in (False, True):
        out, weights = ours(query, key, value, attn_mask=mask, need_weights=need_weights)
        assert torch.equal(out[:, 2], ours.out_proj.bias.expand(3, EMBED))
        assert weights is None or not weights[:, 2].any()
        (gradient,) = torch.autograd.grad(out.sum(), query)
        assert not gradient[:, 2].any()
        assert gradient.isfinite().all()


def test_padding_may_hold_anything() -> None:
    _, ours = pair(batch_first=True)
    query, key, value = sequences(ours, "batch first")
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[0, 4:] = padding[2, 6:] = True
    wanted = ours(query, key, value, key_padding_mask=padding)
    key[padding], value[padding] = math.nan, math.inf
    torch.testing.assert_close(ours(query, key, value, key_padding_mask=padding), wanted, rtol=0, atol=0)


def test_dropout_in_training_alone() -> None:
    theirs, ours = pair(dropout=0.5, batch_first=True)
    query, key, value = sequences(ours, "batch first", q_length=40, k_length=60)
    torch.manual_seed(3)
    out, weights = ours(query, key, value, average_attn_weights=False)
    torch.manual_seed(3)
    again, none = ours(query, key, value, need_weights=False)
    assert none is None
    assert torch.equal(out, again)
    kept = weights != 0
    assert 0.45 < kept.double().mean() < 0.55
    plain = theirs.eval()(query, key, value, average_attn_weights=False)[1]
    torch.testing.assert_close(weights, (2 * plain).where(kept, 0.0), rtol=1e-9, atol=1e-12)
    values = nn.functional.linear(value, *(p.chunk(3)[2] for p in (ours.in_proj_weight, ours.in_proj_bias)))
    heads = weights @ values.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj(heads.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-10)
    ours.eval()
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), *((dtype, on) for dtype in (torch.bfloat16, torch.float16) for on in (False, True))],
)
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_lower_precisions(dtype, autocast, mask) -> None:
    theirs, _ = pair(torch.float32 if autocast else dtype, batch_first=True, add_bias_kv=True)
    ours = heedful.convert(copy.deepcopy(theirs))[0]
    exact = copy.deepcopy(theirs).double()
    tensors = sequences(theirs, "batch first", q_length=9, k_length=33)
    given = {} if mask is None else {"attn_mask": excluding((9, 33), mask, tensors[0].dtype)}
    wanted = exact(*[t.double() for t in tensors], **{n: m if mask == "bool" else m.double() for n, m in given.items()})
    with torch.autocast("cpu", dtype, enabled=autocast):
        for need_weights in (False, True):
            found = ours(*tensors, **given, need_weights=need_weights)
            like = theirs(*tensors, **given, need_weights=need_weights)
            for a, b, exactly in zip(found, like, wanted, strict=True):
                if b is None:
                    assert a is None
                    continue
                assert a.dtype == b.dtype
                # Projections round too, the same way on both sides; a rounding or two apart is all that is left.
                error, reference = (a - exactly).abs().max(), (b - exactly).abs().max()
                assert error <= 2 * reference + 4 * torch.finfo(dtype).eps * exactly.abs().max()


def test_masks_of_different_types_go_together() -> None:
    theirs, ours = pair(batch_first=True)
    tensors = sequences(ours, "batch first")
    given = masks("float", "bool", "batch first")
    padding = torch.zeros(3, 7, dtype=torch.float64).masked_fill(given["key_padding_mask"], -math.inf)
    wanted = results(theirs, tensors, attn_mask=given["attn_mask"], key_padding_mask=padding)
    found = results(ours, tensors, **given)
    torch.testing.assert_close(found["out"], wanted["out"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found["weights"], wanted["weights"], rtol=1e-9, atol=1e-10)

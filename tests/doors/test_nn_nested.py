"""Nested tensors in heedful.nn.MultiheadAttention: each sequence as alone, and as torch's fast path."""

from __future__ import annotations

import pytest
import torch
from inputs import pattern_examples
from torch import Tensor, nn

from heedful import Causal, Mask, Pattern, Prefix, SlidingWindow
from heedful.nn import MultiheadAttention

EMBED, HEADS = 24, 4
LENGTHS = (3, 1, 0, 17)
LAYOUTS = (torch.strided, torch.jagged)
# Those that count positions; masks, blocks and documents have lengths of their own, which the sequences have not.
BY_POSITION = [pattern for pattern in pattern_examples(1, HEADS, 17, 17) if pattern.by_position]


def module(**options) -> MultiheadAttention:
    made = MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64, **options)
    nn.init.normal_(made.in_proj_bias)
    return made


def sequences(lengths=LENGTHS) -> list[Tensor]:
    return [torch.randn(length, EMBED, dtype=torch.float64, requires_grad=True) for length in lengths]


def nested(tensors: list[Tensor], layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor(tensors, layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pattern", [None, *BY_POSITION], ids=str)
def test_each_sequence_as_alone(layout, pattern: Pattern | None) -> None:
    ours, tensors = module(pattern=pattern), sequences()
    x = nested(tensors, layout)
    out, none = ours(x, x, x, need_weights=False)
    assert none is None
    assert out.is_nested
    assert out.layout == layout
    alone = [ours(t, t, t, need_weights=False)[0] for t in tensors]
    for found, wanted in zip(out.unbind(), alone, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    found = torch.autograd.grad((x + out).values().square().sum(), [*tensors, *ours.parameters()])
    loss = sum((t + one).square().sum() for t, one in zip(tensors, alone, strict=True))
    wanted = torch.autograd.grad(loss, [*tensors, *ours.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("average", [False, True])
def test_weights_and_other_keys(layout, average) -> None:
    ours, queries, keys, values = (
        module(pattern=Causal()),
        sequences(),
        sequences((5, 2, 4, 9)),
        sequences((5, 2, 4, 9)),
    )
    q, k, v = (nested(tensors, layout) for tensors in (queries, keys, values))
    out, weights = ours(q, k, v, average_attn_weights=average)
    assert weights.shape == ((4, 17, 9) if average else (4, HEADS, 17, 9))
    for n, tensors in enumerate(zip(queries, keys, values, strict=True)):
        wanted, wanted_weights = ours(*tensors, average_attn_weights=average)
        torch.testing.assert_close(out.unbind()[n], wanted, rtol=1e-9, atol=1e-10)
        rows, columns = LENGTHS[n], keys[n].shape[0]
        torch.testing.assert_close(weights[n, ..., :rows, :columns], wanted_weights, rtol=1e-9, atol=1e-10)
        assert not weights[n, ..., rows:, :].any()
        assert not weights[n, ..., columns:].any()
    assert torch.autograd.grad(weights.square().sum(), keys[0])[0].any()


@torch.no_grad()
def test_as_torchs_fast_path() -> None:
    ours = module().eval()
    theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64).eval()
    theirs.load_state_dict(ours.state_dict())
    x = nested([t.detach() for t in sequences((3, 1, 17))], torch.strided)
    for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        (wanted, wanted_weights), (found, weights) = theirs(x, x, x, **options), ours(x, x, x, **options)
        torch.testing.assert_close(found.to_padded_tensor(0.0), wanted.to_padded_tensor(0.0), rtol=1e-9, atol=1e-10)
        assert (weights is None) == (wanted_weights is None)
        if weights is not None:
            torch.testing.assert_close(weights, wanted_weights, rtol=1e-9, atol=1e-10)


def test_dropout() -> None:
    ours, x = module(dropout=0.5), nested(sequences(), torch.jagged)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.3 < (weights[3] == 0).double().mean() < 0.7


def test_what_does_not_go_with_them() -> None:
    x, y = nested(sequences(), torch.jagged), nested(sequences((3, 1, 17)), torch.jagged)
    mask, dense = torch.zeros(17, 17), torch.randn(4, 17, EMBED, dtype=torch.float64)
    other = nested(sequences((1, 3, 0, 17)), torch.jagged)
    for error, message, call in (
        (ValueError, "attn_mask takes None", lambda: module()(x, x, x, attn_mask=mask)),
        (ValueError, "key_padding_mask takes None", lambda: module()(x, x, x, key_padding_mask=mask[:4])),
        (RuntimeError, "Need attn_mask", lambda: module()(x, x, x, is_causal=True)),
        (ValueError, "add_bias_kv takes False", lambda: module(add_bias_kv=True)(x, x, x)),
        (ValueError, "add_zero_attn takes False", lambda: module(add_zero_attn=True)(x, x, x)),
        (ValueError, "batch_first takes True", lambda: MultiheadAttention(EMBED, HEADS)(x, x, x)),
        (ValueError, "key takes as many as query", lambda: module()(x, y, y)),
        (ValueError, "value takes sequences as long", lambda: module()(x, x, other)),
        (TypeError, "key takes a nested tensor", lambda: module()(x, dense, dense)),
        (ValueError, "pattern takes a pattern of positions", lambda: module(pattern=Mask(mask > 0))(x, x, x)),
        (AssertionError, "received 1-D", lambda: module()(*3 * [torch.nested.nested_tensor([])])),
    ):
        with pytest.raises(error, match=message):
            call()


@torch.no_grad()
@pytest.mark.parametrize("pattern", [None, SlidingWindow(2), Prefix(2) | SlidingWindow(1)], ids=str)
def test_a_torch_layer_passes_them_on(pattern) -> None:
    """As torch.nn.TransformerEncoder makes them of a padding mask."""
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 32, batch_first=True, dtype=torch.float64)
    layer.self_attn = module(pattern=pattern)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    tensors = [t.detach() for t in sequences((3, 1, 17))]
    padded = nested(tensors, torch.strided).to_padded_tensor(7.0)
    padding = torch.arange(17) >= torch.tensor([[3], [1], [17]])
    out = encoder(padded, src_key_padding_mask=padding)
    assert not out[padding].any()
    for n, tensor in enumerate(tensors):
        wanted = tensor[None]
        for one in encoder.layers:
            wanted = one(wanted)
        torch.testing.assert_close(out[n, : len(tensor)], wanted[0], rtol=1e-9, atol=1e-10)

"""transformers' mask functions against the patterns they are read as."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_compatibility_function,
    packed_sequence_mask_function,
    padding_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from heedful.hf import grid, masks, pattern_mask, recognise

CPU = torch.device("cpu")
MaskFunction = Callable[..., Any]


def made(function: MaskFunction, lengths: tuple[int, int], offsets: tuple[int, int] = (0, 0), **options: Any) -> Any:
    """The pattern mask, after its equality with transformers' own bool mask was checked."""
    arguments = {
        "batch_size": 2,
        "q_length": lengths[0],
        "kv_length": lengths[1],
        "q_offset": offsets[0],
        "kv_offset": offsets[1],
        "mask_function": function,
        **options,
    }
    mask = pattern_mask(**arguments)
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    assert mask.shape == expected.shape
    assert torch.equal(mask.dense(), expected)
    return mask


def structured(mask: masks.PatternMask) -> bool:
    return all(t.dtype != torch.bool for t in mask.pattern.operands(mask.q_length, mask.k_length))


BLOCKS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 2] + [-1] * 10]).expand(2, -1)
GRIDS = [((7, 7), (0, 0)), ((1, 9), (8, 0)), ((3, 9), (6, 0)), ((4, 16), (0, 0)), ((2, 16), (5, 0)), ((3, 8), (12, 7))]


@pytest.mark.parametrize(("lengths", "offsets"), GRIDS)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        causal_mask_function,
        bidirectional_mask_function,
        sliding_window_causal_mask_function(3),
        sliding_window_bidirectional_mask_function(2),
        chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
        chunked_causal_mask_function(4, torch.tensor([3, 3])),
        chunked_causal_mask_function(3, torch.tensor([1, 1])),
        or_masks(sliding_window_overlay(2), causal_mask_function),
        and_masks(or_masks(causal_mask_function, blockwise_overlay(BLOCKS)), sliding_window_overlay(4)),
        and_masks(causal_mask_function, padding_mask_function(torch.arange(20).expand(2, -1) > 2)),
    ],
)
def test_recognised(function: MaskFunction, lengths: Any, offsets: Any, as_tensor: bool) -> None:
    q_offset = torch.tensor(offsets[0]) if as_tensor else offsets[0]
    assert structured(made(function, lengths, (q_offset, offsets[1])))


@pytest.mark.parametrize(("lengths", "offsets"), GRIDS)
def test_a_traced_offset_stays_a_tensor(lengths: Any, offsets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the offset cannot be read (another device, a graph being traced) it becomes an operand of its own."""
    monkeypatch.setattr(grid, "is_tracing", lambda: True)
    offset = torch.tensor(offsets[0])
    mask = made(sliding_window_causal_mask_function(3), lengths, (offset, offsets[1]))
    assert structured(mask)
    before = mask.dense()
    offset.add_(1)
    assert torch.equal(mask.dense(), before)


@pytest.mark.parametrize("lengths", [(1, 9), (1, 12)])
def test_one_query_of_a_left_padded_chunked_batch(lengths: tuple[int, int]) -> None:
    function = chunked_causal_mask_function(4, torch.tensor([0, 3]))
    assert structured(made(function, lengths, (8, 0)))
    assert structured(made(function, lengths, (14, 6)))


def test_left_padded_chunked_prefill() -> None:
    """Without chunks as long as every sequence is inside its first one."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1]]).bool()
    for size, fits in ((5, True), (4, False), (1, False)):
        function = chunked_causal_mask_function(size, torch.tensor([2, 4]))
        for lengths, offsets in [((7, 7), (0, 0)), ((2, 7), (5, 0)), ((3, 5), (4, 2))]:
            mask = made(function, lengths, offsets, attention_mask=real)
            assert structured(mask)
            assert ("Rectangles" in repr(mask)) != fits
    function = chunked_causal_mask_function(5, torch.tensor([2, 4]))
    assert structured(made(function, (7, 7), attention_mask=real | True))
    assert structured(made(function, (7, 7)))
    assert not structured(made(chunked_causal_mask_function(1, torch.tensor([2, 4])), (300, 300)))


@pytest.mark.parametrize(
    "inner",
    [
        causal_mask_function,
        sliding_window_causal_mask_function(3),
        chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64)),
        or_masks(causal_mask_function, sliding_window_overlay(2)),
    ],
)
def test_packed(inner: MaskFunction) -> None:
    positions = torch.cat([torch.arange(5), torch.arange(1), torch.arange(7)]).expand(2, -1)
    ids = masking_utils.find_packed_sequence_indices(positions)
    mask = made(packed_sequence_compatibility_function(inner, positions, ids), (13, 13))
    assert structured(mask)
    assert mask.has_documents


@pytest.mark.parametrize(
    ("inner", "known"),
    [
        (causal_mask_function, True),
        (sliding_window_causal_mask_function(3), True),
        (chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int64)), False),
    ],
)
def test_sequences_packed_differently_in_each_row(inner: MaskFunction, known: bool) -> None:
    lengths = [[4, 5, 9], [6, 1, 2, 9], [18]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = masking_utils.find_packed_sequence_indices(positions)
    function = packed_sequence_compatibility_function(inner, positions, ids)
    mask = made(function, (18, 18), batch_size=3)
    assert structured(mask) == known
    assert mask.has_documents
    assert structured(made(packed_sequence_mask_function(ids), (18, 18), batch_size=3))


def test_more_sequences_than_are_worth_an_atom_each_are_dense() -> None:
    ids = torch.stack([torch.arange(300), torch.zeros(300, dtype=torch.int64)])
    assert not structured(made(packed_sequence_mask_function(ids), (300, 300)))
    assert structured(made(packed_sequence_mask_function(ids // 2), (300, 300)))


def test_packed_positions_that_do_not_start_at_0_are_dense() -> None:
    positions = torch.cat([torch.arange(5), torch.arange(2, 9)]).expand(2, -1)
    ids = masking_utils.find_packed_sequence_indices(positions)
    inner = chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.int64))
    assert not structured(made(packed_sequence_compatibility_function(inner, positions, ids), (12, 12)))


def test_packed_blocks_are_dense() -> None:
    """transformers looks their ids up by the position inside the sequence."""
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, -1)
    ids = masking_utils.find_packed_sequence_indices(positions)
    inner = or_masks(causal_mask_function, blockwise_overlay(BLOCKS))
    assert not structured(made(packed_sequence_compatibility_function(inner, positions, ids), (12, 12)))


def test_sequence_ids_that_come_back_are_dense() -> None:
    assert structured(made(packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 2]] * 2)), (5, 5)))
    assert not structured(made(packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 0]] * 2)), (5, 5)))


def test_blocks() -> None:
    ids = torch.tensor([[0, 0, -1, 1, 1, 1, -1, -1, 2, 2]]).expand(2, -1)
    full = or_masks(causal_mask_function, blockwise_overlay(ids))
    for lengths, offsets in [((10, 10), (0, 0)), ((6, 10), (4, 0)), ((4, 7), (4, 3)), ((1, 10), (9, 0))]:
        assert structured(made(full, lengths, offsets))
    broken = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[0, -1, 0]] * 2)))
    assert not structured(made(broken, (3, 3)))


def test_blocks_elsewhere_in_each_row() -> None:
    ids = torch.tensor([[0, 0, -1, 1, 1, 1, -1, -1, 2, 2], [-1, -1, 4, 4, 0, 0, -1, -1, -1, -1], [-1] * 10])
    full = or_masks(causal_mask_function, blockwise_overlay(ids))
    for function in (full, and_masks(full, sliding_window_overlay(3))):
        for lengths, offsets in [((10, 10), (0, 0)), ((6, 10), (4, 0)), ((4, 7), (4, 3)), ((1, 10), (9, 0))]:
            assert structured(made(function, lengths, offsets, batch_size=3))
    broken = or_masks(causal_mask_function, blockwise_overlay(torch.tensor([[0, -1, 0], [-1, 1, 1]])))
    assert not structured(made(broken, (3, 3)))


def test_text_after_the_images_needs_no_blocks() -> None:
    ids = torch.tensor([[0, 0, -1, -1], [-1, 0, 0, -1]])
    assert structured(made(or_masks(causal_mask_function, blockwise_overlay(ids)), (1, 4), (3, 0)))


def test_model_files_own_windows() -> None:
    from transformers.models.gemma3.modeling_gemma3 import _bidirectional_window_overlay
    from transformers.models.gemma4.modeling_gemma4 import sliding_window_mask_function

    for lengths, offsets in GRIDS:
        function = or_masks(sliding_window_causal_mask_function(3), _bidirectional_window_overlay(3))
        assert structured(made(function, lengths, offsets))
        for sides in ((3, 2), (1, 4), (4, 1), (2, 0)):
            function = and_masks(bidirectional_mask_function, sliding_window_mask_function(sides))
            assert structured(made(function, lengths, offsets))


def test_a_model_files_window_of_another_form_is_dense() -> None:
    from transformers.models.t5gemma2.modeling_t5gemma2 import sliding_window_mask_function

    for is_causal in (False, True):
        assert not structured(made(sliding_window_mask_function(3, is_causal), (6, 6)))


def test_a_function_that_allows_everything() -> None:
    function = or_masks(causal_mask_function, lambda *args: torch.tensor(True, dtype=torch.bool))
    assert structured(made(function, (5, 5), use_vmap=True))


def test_what_is_not_known_is_dense_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def every_other(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (q - k) % 2 == 0

    masks._logged.clear()
    with caplog.at_level(logging.WARNING, logger="heedful"):
        for _ in range(2):
            mask = made(and_masks(causal_mask_function, every_other), (6, 6))
    assert len([record for record in caplog.records if "every_other" in record.message]) == 1
    operands = mask.pattern.operands(6, 6)
    assert [tuple(operand.shape) for operand in operands] == [(1, 1, 6, 6)]


def test_a_function_that_merely_has_a_known_name_is_dense() -> None:
    def sliding_window_overlay(sliding_window: int) -> MaskFunction:
        def inner_mask(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return k >= q - sliding_window

        return inner_mask

    assert not structured(made(and_masks(sliding_window_overlay(2), causal_mask_function), (6, 6)))


def test_a_function_that_changed_its_meaning_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recognise, "_READERS", dict(recognise._READERS))

    def window(sliding_window: int) -> MaskFunction:
        def inner_mask(batch: Any, head: Any, q: Any, k: Any) -> Any:
            return k >= q - sliding_window

        return inner_mask

    recognise._trust(window(3), recognise._left_window)
    assert "does not mean" in caplog.text
    assert not structured(made(and_masks(window(2), causal_mask_function), (6, 6)))


def test_every_known_function_agrees_with_the_installed_transformers() -> None:
    known = {example.__code__ for _, example, _ in recognise._examples()}
    assert known <= recognise._READERS.keys()


@pytest.mark.parametrize("real", list(itertools.product([0, 1], repeat=5)))
def test_padding(real: tuple[int, ...]) -> None:
    attention_mask = torch.tensor([real, (1, 1, 1, 1, 1)]).bool()
    runs = "".join(map(str, real)).strip("0")
    for lengths, offsets in [((5, 5), (0, 0)), ((1, 5), (4, 0)), ((2, 8), (3, 0)), ((2, 3), (3, 2))]:
        for function in (causal_mask_function, bidirectional_mask_function):
            mask = made(function, lengths, offsets, attention_mask=attention_mask)
            assert structured(mask) or "0" in runs


def test_an_earlier_mask_is_returned() -> None:
    mask = made(causal_mask_function, (4, 4))
    assert pattern_mask(2, 4, 4, attention_mask=mask) is mask
    dense = mask.dense()
    assert pattern_mask(2, 4, 4, attention_mask=dense) is dense


def test_padding_of_the_wrong_rank_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_mask: got shape"):
        pattern_mask(2, 4, 4, attention_mask=torch.ones(2, 4, 4, dtype=torch.bool))


def test_carrier() -> None:
    mask = made(causal_mask_function, (4, 6), (2, 0))
    dense = mask.dense()
    assert mask.contiguous() is mask
    assert mask.to("cpu", non_blocking=True) is mask
    assert (mask.ndim, mask.dim(), mask.size(), mask.size(-1), mask.dtype) == (4, 4, (2, 1, 4, 6), 6, torch.bool)
    assert torch.equal(mask[:, :, :2, :5], dense[:, :, :2, :5])
    assert torch.equal(torch.cat([mask, dense], dim=-1), torch.cat([dense, dense], dim=-1))
    assert torch.equal(torch.where(mask, 1, 0), dense.long())
    with pytest.raises(TypeError, match="outside transformers' attention interface"):
        torch.zeros(2, 1, 4, 6) + mask
    with pytest.raises(TypeError, match=r"heedful\.hf\.patch\(model\) takes some of these over"):
        mask + torch.zeros(2, 1, 4, 6)
    with pytest.raises(TypeError, match="outside transformers' attention interface"):
        mask[:, 0, 0, :]

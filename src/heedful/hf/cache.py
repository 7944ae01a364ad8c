"""A cache for transformers' `generate` that is written in place: no step copies what earlier steps left."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from heedful.cache_kinds.store import memory
from heedful.errors import wrong_type, wrong_value

SMALLEST = 64


class HeedfulCache(DynamicCache):
    """A `past_key_values` for `model.generate` and for calls of a model, with any attention implementation.

    Keys and values lie in one buffer per layer, which doubles where it is full; layers with a sliding window keep about
    two windows. Layers of other kinds, such as linear attention, are transformers' own.

        model.generate(**inputs, past_key_values=heedful.hf.HeedfulCache(config=model.config))

    Args:
        config: the model's; None makes every layer one of full attention.
        max_length: positions to make room for at once, beyond which a call is refused; None begins small and grows.

    Raises:
        TypeError, ValueError: `max_length` is not an int of at least 1; at a call, the keys have other sizes, dtype
            or device than those before, or need a gradient, or do not fit `max_length`.
    """

    def __init__(self, config: PreTrainedConfig | None = None, max_length: int | None = None) -> None:
        if max_length is not None and (not isinstance(max_length, int) or isinstance(max_length, bool)):
            raise wrong_type("max_length", repr(max_length), "an int or None")
        if max_length is not None and max_length < 1:
            raise wrong_value("max_length", max_length, "1 or more")
        super().__init__(config=config)
        if self.layer_class_to_replicate is not None:
            make: Any = partial(BufferLayer, max_length=max_length)
            self.layer_class_to_replicate = make
        for index, layer in enumerate(self.layers):
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
                window = getattr(layer, "sliding_window", None)
                self.layers[index] = BufferLayer(sliding_window=window, max_length=max_length)


class BufferLayer(DynamicLayer):
    """One layer's keys and values in buffers (B, Hkv, capacity, D): positions `base` to `length`, from the front on.

    sliding_window: as transformers counts it, a query's own key included; None for full attention.
    """

    _key: Tensor
    _value: Tensor

    def __init__(self, sliding_window: int | None = None, max_length: int | None = None) -> None:
        # transformers keeps `keys` and `values` as attributes, here they are views made when asked for.
        self.sliding_window, self.max_length = sliding_window, max_length
        self.is_sliding = sliding_window is not None
        self.is_initialized = False
        # Whether `crop` decides what is forgotten, and the first position that it has not forgotten.
        self.record_past = False
        self._floor = 0
        self._base = self._length = 0
        self._made = False

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        return self._key[:, :, : self._length - self._base] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        return self._value[:, :, : self._length - self._base] if self.is_initialized else None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        if not self._made or not self._fits(key_states, value_states):
            capacity = 0 if self.max_length is None else self._bounded(self.max_length)
            self._key, self._value = (_buffer(t, t.shape[0], capacity) for t in (key_states, value_states))
            self._made = True
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, Hkv, n, D or Dv) behind what is there; returns views of what the new queries may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        if key_states.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "this cache keeps its length in Python, which replays of a CUDA graph would not change: capture a "
                "model with transformers.StaticCache"
            )
        count, seen = key_states.shape[2], self._first_seen()
        end = self._length + count - self._base
        if end > self._key.shape[2]:
            if not self._make_room(count):
                return self._pass_through(key_states, value_states, seen)
            end = self._length + count - self._base
        self._key.narrow(2, end - count, count).copy_(key_states)
        self._value.narrow(2, end - count, count).copy_(value_states)
        self._length += count
        begin = seen - self._base
        return self._key.narrow(2, begin, end - begin), self._value.narrow(2, begin, end - begin)

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self._first_seen()
        return self._length - seen + query_length, seen

    def get_max_length(self) -> int:
        if self.sliding_window is not None:
            return self.sliding_window
        return -1 if self.max_length is None else self.max_length

    def activate_past_recording(self) -> None:
        """From here on what the window has left behind is kept until `crop` says that it is not needed."""
        if not self.record_past:
            self._floor = self._first_seen()
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last -`tokens_to_remove` positions away, and lets a window forget what is behind it."""
        if tokens_to_remove > 0:
            raise wrong_value("tokens_to_remove", tokens_to_remove, "0 or less, minus the positions to take away")
        if not self.is_initialized:
            return
        length = max(self._length + tokens_to_remove, 0)
        floor = 0 if self.sliding_window is None else max(length - self.sliding_window + 1, 0)
        if floor < self._base:
            raise RuntimeError(
                f"crop cannot take {-tokens_to_remove} positions away: the sliding window has left behind what the "
                "position before them sees; call activate_past_recording before what may have to be undone"
            )
        self._length, self._floor = length, floor

    def reset(self) -> None:
        self._base = self._length = self._floor = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self._length:
            return
        index = beam_idx.to(self._key.device)
        if index.numel() != self._key.shape[0]:
            self.batch_select_indices(index)
            return
        moved = (index != torch.arange(index.numel(), device=index.device)).nonzero().flatten()
        if moved.numel():
            for buffer in (self._key, self._value):
                held = buffer[:, :, : self._length - self._base]
                held[moved] = held.index_select(0, index[moved])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._length:
            self.batch_select_indices(torch.arange(self._key.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self._length:
            return
        held = self._length - self._base
        self._key, self._value = (_chosen(buffer, indices, held) for buffer in (self._key, self._value))

    def _first_seen(self) -> int:
        """The first position that the next query sees."""
        return 0 if self.sliding_window is None else max(self._length - self.sliding_window + 1, 0)

    def _bounded(self, capacity: int) -> int:
        """As much of a capacity as a layer has use for."""
        if self.sliding_window is None or self.record_past:
            return capacity
        # A window's worth of room, so that moving the window to the front costs each position one more copy.
        return min(capacity, max(2 * self.sliding_window, SMALLEST))

    def _make_room(self, count: int) -> bool:
        """Room for `count` more positions; False where a window's buffer is not to grow so large."""
        keep = self._floor if self.record_past else self._first_seen()
        held, capacity = self._length - keep, self._key.shape[2]
        needed = held + count
        # Less than half of it free, the next move would come too soon.
        if 2 * needed > capacity:
            wanted = max(needed, 2 * capacity, SMALLEST)
            if self.max_length is not None:
                wanted = max(needed, min(wanted, self.max_length))
            capacity = max(capacity, self._bounded(wanted))
        if needed > capacity:
            return False
        begin = keep - self._base
        self._key, self._value = (_moved(buffer, begin, held, capacity) for buffer in (self._key, self._value))
        self._base = keep
        return True

    def _pass_through(self, key_states: Tensor, value_states: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        """A call of more positions than a window keeps: it sees them where they are, and the last are kept."""
        assert self.sliding_window is not None
        begin, end = seen - self._base, self._length - self._base
        length = self._length + key_states.shape[2]
        kept = min(self.sliding_window - 1, length)
        states, buffers = [], []
        for buffer, new in ((self._key, key_states), (self._value, value_states)):
            whole = torch.cat([buffer[:, :, begin:end], new], 2) if end > begin else new
            capacity = max(buffer.shape[2], self._bounded(2 * kept))
            fresh = buffer if buffer.shape[2] >= capacity else _buffer(buffer, buffer.shape[0], capacity)
            fresh[:, :, :kept] = whole[:, :, whole.shape[2] - kept :]
            states.append(whole)
            buffers.append(fresh)
        self._key, self._value = buffers
        self._length, self._base = length, length - kept
        return states[0], states[1]

    def _fits(self, key_states: Tensor, value_states: Tensor) -> bool:
        return all(
            new.shape[:2] == old.shape[:2]
            and new.shape[3] == old.shape[3]
            and new.dtype == old.dtype
            and new.device == old.device
            for new, old in ((key_states, self._key), (value_states, self._value))
        )

    def _check(self, key_states: Tensor, value_states: Tensor) -> None:
        if not self._fits(key_states, value_states):
            raise wrong_value(
                "key_states",
                f"shape {tuple(key_states.shape)}, {key_states.dtype} on {key_states.device}",
                f"batch, heads, dim, dtype and device of what the cache holds, {tuple(self._key.shape)}, "
                f"{self._key.dtype} on {self._key.device}; reset() empties it",
            )
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise wrong_value(
                "key_states",
                "tensors that need a gradient",
                "ones that need none, as the cache is written in place: use torch.no_grad, or DynamicCache to train",
            )
        if self.max_length is not None and self._length + key_states.shape[2] > self.max_length:
            raise wrong_value(
                "key_states",
                f"{key_states.shape[2]} positions on top of {self._length}",
                f"at most {self.max_length} in all, the cache's max_length",
            )


def _buffer(like: Tensor, batch: int, capacity: int) -> Tensor:
    return memory(like, batch, like.shape[1], capacity, like.shape[3])


def _chosen(buffer: Tensor, indices: Tensor, held: int) -> Tensor:
    chosen = buffer[:, :, :held][indices.to(buffer.device)]
    fresh = _buffer(buffer, chosen.shape[0], buffer.shape[2])
    fresh[:, :, :held] = chosen
    return fresh


def _moved(buffer: Tensor, begin: int, held: int, capacity: int) -> Tensor:
    """`held` positions from `begin` on at the front, of the same buffer or of a larger one."""
    source = buffer[:, :, begin : begin + held]
    if capacity == buffer.shape[2]:
        buffer[:, :, :held] = source.clone() if begin < held else source
        return buffer
    fresh = _buffer(buffer, buffer.shape[0], capacity)
    fresh[:, :, :held] = source
    return fresh

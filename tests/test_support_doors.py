"""What the support matrix says of doors: every parameter is declared, and every declaration is a call that works."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tolerance import expected
from torch import Tensor

import heedful
import heedful.numpy as heedful_numpy
from heedful import flash_attn
from heedful.backend.native.backend import NativeBackend
from heedful.numpy.request import Options as NumpyOptions
from heedful.problem import Problem
from heedful.sdpa import scaled_dot_product_attention
from heedful.support import DOORS, Ask, Door, asks
from heedful.support.asks import DERIVATIVES, INPUTS, KEYS, OPTIONS

ROWS = {row.name: row for row in asks()}
CELLS = [(door, ROWS[name]) for door in DOORS for name in door.says]
HEADER = Path(heedful.get_include()) / "heedful.h"


def identity(value: object) -> str:
    return re.sub(r"\W+", "_", value.name) if isinstance(value, Door | Ask) else str(value)


def parameters(door: Door) -> set[str]:
    where, names = door.target.split(":")
    if where.endswith(".h"):
        bodies = [re.search(rf"typedef struct {name} {{(.*?)}}", HEADER.read_text(), re.S) for name in names.split(",")]
        declarations = [line for body in bodies for line in body[1].split(";") if line.strip()]
        return {name.strip(" *") for line in declarations for name in line.split(None, 1)[1].split(",")}
    target = importlib.import_module(where)
    for name in names.split("."):
        target = getattr(target, name)
    found = set(inspect.signature(target).parameters)
    return found - {"options"} | set(NumpyOptions.__annotations__) if door.column == "numpy" else found


@pytest.mark.parametrize("door", DOORS, ids=identity)
def test_every_parameter_is_declared(door: Door) -> None:
    said = {name for text in door.says.values() for name in re.findall(r"`(\w+)=", text)}
    if door.column == "numpy":
        # flash_attention_forward takes what attention takes.
        assert set(heedful_numpy.Features.__annotations__) <= said | door.silent
    assert said | door.silent == parameters(door)
    assert not said & door.silent


@pytest.mark.parametrize("door", DOORS, ids=identity)
def test_rows_exist_and_gradients_agree(door: Door) -> None:
    assert door.says.keys() <= ROWS.keys()
    assert door.gradients == ("gradient" in door.says)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """The problems that calls ask the engine about, which they do where nothing is remembered."""
    seen: list[Problem] = []
    asked = NativeBackend.not_supported_reasons

    def listen(self: NativeBackend, problem: Problem) -> list[str]:
        seen.append(problem)
        return asked(self, problem)

    monkeypatch.setattr(NativeBackend, "not_supported_reasons", listen)
    # On tiers without fast kernels, and under some tables of heedful tune, such calls are PyTorch's.
    monkeypatch.setattr("heedful.sdpa.call.engine_pays", lambda *sizes, **options: True)
    heedful.clear_caches()
    yield seen
    heedful.clear_caches()


def inputs(row: Ask) -> tuple[Tensor, ...]:
    problem = row.problem()
    sizes = (
        (problem.heads, problem.head_dim),
        (problem.kv_heads, problem.head_dim),
        (problem.kv_heads, problem.value_dim),
    )
    return tuple(torch.randn(problem.batch, heads, problem.q_length, dim) for heads, dim in sizes)


def mask_of(row: Ask) -> Tensor:
    problem = row.problem()
    return row.pattern.dense(problem.q_length, problem.k_length)


def turned(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


OPTION = {
    "bias": {"bias": torch.randn(64, 64)},
    "alibi": {"alibi_slopes": torch.rand(4)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.randn(4)},
    "dropout": {"dropout_p": 0.25},
    "lse": {"return_lse": True},
    "weights": {"return_weights": True},
    "sparse_weights": {"return_weights": "sparse"},
}


def through_attention(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    if row.name == "causal":
        return heedful.attention(q, k, v, causal=True)
    if row.name == "paged":
        return heedful.attention(q, k, v, cache=heedful.KVCache(block_size=16))
    return heedful.attention(q, k, v, pattern=row.pattern, **OPTION.get(row.name, {}))


def through_sdpa(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    options = {
        "top_left": {"is_causal": True},
        "bias": {"attn_mask": torch.randn(64, 64)},
        "dropout": {"dropout_p": 0.25},
        "grouped_heads": {"enable_gqa": True},
    }
    masked = {"attn_mask": mask_of(row)} if row.group == KEYS and row.name != "full" else {}
    return scaled_dot_product_attention(q, k, v, **options.get(row.name, masked))


def through_hugging_face(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    from heedful.hf import PatternMask, attention_forward
    from heedful.hf.grid import Grid

    module = SimpleNamespace(training=row.name == "dropout", is_causal=False)
    ends = torch.tensor([0, 27, 64], dtype=torch.int32)
    pattern = PatternMask(row.pattern, Grid(2, 64, 64, 0, 0, q.device)) if row.group == KEYS else None
    options = {
        "causal": {"is_causal": True},
        "window": {"sliding_window": 10, "is_causal": True},
        "documents": {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "is_causal": True},
        "mask": {"attention_mask": mask_of(row)},
        "bias": {"position_bias": torch.randn(1, 4, 64, 64)},
        "alibi": OPTION["alibi"],
        "softcap": OPTION["softcap"],
        "sinks": {"s_aux": torch.randn(4)},
        "dropout": {"dropout": 0.25},
        "weights": {"output_attentions": True},
    }
    found = {"attention_mask": None} | options.get(row.name, {"attention_mask": pattern})
    out, weights = attention_forward(module, q, k, v, **found)
    assert (weights is None) == (row.name != "weights")
    return out.transpose(1, 2)


def flash_options(row: Ask) -> dict[str, object]:
    options = {
        "causal": {"causal": True},
        "window": {"window_size": (9, 0)},
        "softcap": OPTION["softcap"],
        "alibi": OPTION["alibi"],
        "dropout": OPTION["dropout"],
        "lse": {"return_attn_probs": True},
        "sparse_weights": {"return_attn_probs": True, "dropout_p": 0.25},
    }
    return dict(options.get(row.name, {}))


def through_flash_attn(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    found = flash_attn.flash_attn_func(*turned(q, k, v), **flash_options(row))
    return found[0].transpose(1, 2) if isinstance(found, tuple) else found.transpose(1, 2)


def through_varlen(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    """The batch items one after the other, as sequences; for documents both halves of each."""
    cuts = [0, 27, 64, 91, 128] if row.name == "documents" else [0, 64, 128]
    ends = torch.tensor(cuts, dtype=torch.int32)
    options = flash_options(row) | ({"causal": True} if row.name == "documents" else {})
    packed = [t.flatten(0, 1) for t in turned(q, k, v)]
    if row.name == "paged":
        packed[1:] = [t.reshape(8, 16, *t.shape[1:]) for t in packed[1:]]
        options["block_table"] = torch.arange(8, dtype=torch.int32).view(2, 4)
    found = flash_attn.flash_attn_varlen_func(*packed, ends, ends, 64, 64, **options)
    out = found[0] if isinstance(found, tuple) else found
    return out.unflatten(0, (2, 64)).transpose(1, 2)


def through_kvcache(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    options = flash_options(row)
    key, value = turned(k, v)
    if row.name == "padding":
        # q sits at the end of what a sequence holds, which a call that is not causal does not mind.
        options = {"cache_seqlens": torch.tensor([64, 32], dtype=torch.int32)}
    if row.name == "lse":
        options = {"return_softmax_lse": True}
    if row.name == "paged":
        key, value = (t.reshape(8, 16, *t.shape[2:]) for t in (key, value))
        options = {"block_table": torch.arange(8, dtype=torch.int32).view(2, 4)}
    found = flash_attn.flash_attn_with_kvcache(q.transpose(1, 2), key, value, **options)
    return found[0].transpose(1, 2) if isinstance(found, tuple) else found.transpose(1, 2)


def through_modules(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    """A module whose projections are the identity, so that its heads are those of q, k and v."""
    module = heedful.nn.MultiheadAttention(256, 4, dropout=0.25, batch_first=True, bias=False)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.eye(256).repeat(3, 1))
        module.out_proj.weight.copy_(torch.eye(256))
    module.train(row.name == "dropout")
    excluded = ~mask_of(row)
    options = {
        "top_left": {"attn_mask": excluded[0, 0], "is_causal": True},
        "padding": {"key_padding_mask": excluded[:, 0, 0]},
        "mask": {"attn_mask": excluded[0, 0]},
        "bias": {"attn_mask": torch.randn(64, 64)},
        "weights": {"need_weights": True},
    }
    found = {"need_weights": False} | options.get(row.name, {"pattern": row.pattern} if row.group == KEYS else {})
    out, _ = module(*(t.flatten(2) for t in turned(q, k, v)), **found)
    return out.unflatten(2, (4, 64)).transpose(1, 2)


def through_numpy(row: Ask, q: Tensor, k: Tensor, v: Tensor) -> object:
    pairs = 64, 64
    options = {
        "causal": {"causal": True},
        "window": {"window": (9, 0)},
        "mask": {"attn_mask": mask_of(row).numpy()},
        "bias": {"attn_mask": np.zeros(pairs, np.float32)},
        "alibi": {"alibi_slopes": np.zeros(4, np.float32)},
        "softcap": {"softcap": 1e6},
        "sinks": {"sinks": np.full(4, -math.inf, np.float32)},
        "lse": {"return_lse": True},
        "weights": {"return_weights": True},
    }
    found = options.get(row.name, {"pattern": row.pattern})
    out = heedful_numpy.attention(*(t.numpy() for t in turned(q, k, v)), **found)
    return torch.from_numpy(out if isinstance(out, np.ndarray) else out.out).transpose(1, 2)


THROUGH = {
    "attention": through_attention,
    "SDPA": through_sdpa,
    "Hugging Face": through_hugging_face,
    "flash_attn": through_flash_attn,
    "varlen": through_varlen,
    "with_kvcache": through_kvcache,
    "nn": through_modules,
    "numpy": through_numpy,
}


def test_every_door_of_python_is_tried() -> None:
    assert THROUGH.keys() | {"C"} == {door.column for door in DOORS}


@pytest.mark.parametrize(
    ("door", "row"), [c for c in CELLS if c[0].column in THROUGH and c[1].group in (INPUTS, KEYS)], ids=identity
)
def test_which_keys(door: Door, row: Ask, problems: list[Problem]) -> None:
    if door.column == "Hugging Face":
        pytest.importorskip("transformers")
    q, k, v = inputs(row)
    out = THROUGH[door.column](row, q, k, v)
    # The module's two projections round once more each.
    right = expected(q, k, v, pattern=row.pattern).out
    right.check(out) if door.column != "nn" else torch.testing.assert_close(out, right.value.float())
    if door.column == "numpy":
        return
    (problem,) = problems
    assert (problem.kv_heads, problem.value_dim) == (row.problem().kv_heads, row.problem().value_dim)
    recognised = "recognised" in door.says[row.name]
    if recognised or row.name in ("causal", "window", "documents"):
        from heedful.patterns.schedule import MASK

        assert not any(term.kind == MASK for atom in problem.schedule.atoms for term in atom)


@pytest.mark.parametrize(
    ("door", "row"), [c for c in CELLS if c[0].column in THROUGH and c[1].group == OPTIONS], ids=identity
)
def test_options_reach_the_backends(door: Door, row: Ask, problems: list[Problem]) -> None:
    if door.column == "Hugging Face":
        pytest.importorskip("transformers")
    out = THROUGH[door.column](row, *inputs(row))
    assert out is not None
    if door.column == "numpy":
        # The options are such that they change nothing; tests of that door have others.
        return
    assert any(row.features <= problem.features for problem in problems), problems


@pytest.mark.parametrize(
    ("door", "row"),
    [c for c in CELLS if c[0].column in THROUGH and c[1].name == "gradient"],
    ids=identity,
)
def test_gradients(door: Door, row: Ask, problems: list[Problem]) -> None:
    if door.column == "Hugging Face":
        pytest.importorskip("transformers")
    q, k, v = (t.requires_grad_() for t in inputs(row))
    out = THROUGH[door.column](row, q, k, v)
    arriving = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), arriving)
    right = expected(q.detach(), k.detach(), v.detach(), grad_out=arriving).gradients
    for letter, gradient in zip("qkv", gradients, strict=True):
        right[letter].check(gradient) if door.column != "nn" else torch.testing.assert_close(
            gradient, right[letter].value.float(), rtol=1e-4, atol=1e-5
        )
    assert any("gradient" in problem.features for problem in problems)


@pytest.mark.parametrize("door", [door for door in DOORS if not door.gradients], ids=identity)
def test_doors_without_gradients(door: Door) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(ROWS["gradient"]))
    if door.column == "numpy":
        with pytest.raises(TypeError, match="require gradient"):
            heedful_numpy.attention(q, k, v)
        return
    out = THROUGH[door.column](ROWS["full"], q, k, v)
    with pytest.raises(RuntimeError, match="no backward"):
        out.sum().backward()


def test_transforms_have_no_words_of_their_own() -> None:
    """Derivatives beside gradients are asked for by torch.func around a call, which test_support_backends does."""
    for door in DOORS:
        beside = {name for name in door.says if ROWS[name].group == DERIVATIVES} - {"gradient"}
        assert not beside or door.column == "attention"

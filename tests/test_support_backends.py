"""The support matrix against real calls: what it says runs gives right numbers, the rest is refused in its words."""

from __future__ import annotations

import json

import pytest
import torch
from tolerance import Expected, expected
from torch import Tensor

import heedful
from heedful.backend.base import Backend
from heedful.backend.reference.formula import attend
from heedful.choose import BACKENDS, UNAVAILABLE, choose
from heedful.dropout import draw_seed, keep_mask
from heedful.problem import FEATURES
from heedful.support import DOORS, Ask, Verdict, asks, matrix
from heedful.support.asks import DERIVATIVES
from heedful.support.matrix import home
from heedful.support.table import markdown, tables, word

DEVICES = [row for row in asks() if row.name in ("cpu", "cuda")]
TRANSFORMS = [row for row in asks() if row.group == DERIVATIVES]
CALLS = [row for row in asks() if row not in (*DEVICES, *TRANSFORMS)]
DROPOUT = 0.25


def identity(value: object) -> str:
    return value.name if isinstance(value, Ask) else str(value)


def skip_where_it_cannot_run(name: str) -> None:
    if name in UNAVAILABLE:
        pytest.skip(UNAVAILABLE[name])


def verdict_of(row: Ask, name: str) -> Verdict:
    return matrix().backends[row.name][name]


def inputs(row: Ask, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    problem = row.problem(*home(BACKENDS[name]))
    sizes = (
        (problem.batch, problem.heads, problem.q_length, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.k_length, problem.head_dim),
        (problem.batch, problem.kv_heads, problem.k_length, problem.value_dim),
    )
    return tuple(torch.randn(size).to(problem.device_type, dtype or problem.dtype) for size in sizes)


def options(row: Ask, device: torch.device) -> dict[str, object]:
    """What makes a call of `heedful.attention` one of this row."""
    problem = row.problem()
    heads, pairs = problem.heads, (problem.q_length, problem.k_length)
    extra = {
        "bias": lambda: {"bias": torch.randn(pairs, device=device)},
        "alibi": lambda: {"alibi_slopes": torch.rand(heads, device=device)},
        "softcap": lambda: {"softcap": 3.0},
        "sinks": lambda: {"sinks": torch.randn(heads, device=device)},
        "dropout": lambda: {"dropout_p": DROPOUT},
        "lse": lambda: {"return_lse": True},
        "weights": lambda: {"return_weights": True},
        "sparse_weights": lambda: {"return_weights": "sparse"},
        "paged": lambda: {"cache": heedful.KVCache(block_size=16)},
    }
    found: dict[str, object] = {"pattern": row.pattern}
    for feature in row.features:
        found |= extra[feature]()
    return found


def random_state(device: torch.device, state: torch.Tensor | None = None) -> torch.Tensor:
    """That of a device, set to another where one is given."""
    generator = torch.cuda if device.type == "cuda" else torch
    if state is not None:
        generator.set_rng_state(state)
    return generator.get_rng_state()


def wanted(q: Tensor, k: Tensor, v: Tensor, given: dict[str, object], seed: torch.Tensor, grad_out=None) -> Expected:
    named = {name: given[name] for name in ("pattern", "bias", "alibi_slopes", "softcap", "sinks") if name in given}
    if "dropout_p" in given:
        random_state(q.device, seed)
        shape = (*q.shape[:3], k.shape[2])
        named["kept"] = keep_mask(draw_seed(q.device).cpu(), DROPOUT, shape).to(q.device).double() / (1 - DROPOUT)
    return expected(q, k, v, grad_out=grad_out, **named)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("row", CALLS, ids=identity)
def test_outputs(row: Ask, name: str) -> None:
    verdict = verdict_of(row, name)
    skip_where_it_cannot_run(name)
    q, k, v = inputs(row, name)
    given = options(row, q.device)
    if not verdict.forward:
        with pytest.raises(heedful.UnsupportedError) as refusal:
            heedful.attention(q, k, v, backend=name, **given)
        assert tuple(refusal.value.reasons[name]) == verdict.reasons
        return
    seed = random_state(q.device)
    found = heedful.attention(q, k, v, backend=name, **given)
    right = wanted(q, k, v, given, seed)
    right.out.check(found if isinstance(found, Tensor) else found.out)
    if "lse" in row.features:
        right.lse.check(found.lse)
    if row.features & {"weights", "sparse_weights"}:
        assert found.weights.is_sparse == ("sparse_weights" in row.features)
        right.weights.check(found.weights.to_dense())


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("row", [row for row in CALLS if row.gradients], ids=identity)
def test_gradients(row: Ask, name: str) -> None:
    verdict = verdict_of(row, name)
    skip_where_it_cannot_run(name)
    q, k, v = (t.requires_grad_() for t in inputs(row, name))
    given = options(row, q.device)
    if not verdict.gradient:
        with pytest.raises(heedful.UnsupportedError) as refusal:
            heedful.attention(q, k, v, backend=name, **given)
        assert tuple(refusal.value.reasons[name]) == verdict.gradient_reasons
        return
    seed = random_state(q.device)
    found = heedful.attention(q, k, v, backend=name, **given)
    out = found if isinstance(found, Tensor) else found.out
    arriving = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), arriving)
    right = wanted(q.detach(), k.detach(), v.detach(), given, seed, arriving)
    for letter, gradient in zip("qkv", gradients, strict=True):
        right.gradients[letter].check(gradient, letter)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("row", DEVICES, ids=identity)
def test_devices(row: Ask, name: str) -> None:
    skip_where_it_cannot_run(name)
    problem, verdict = row.problem(), verdict_of(row, name)
    if verdict.forward:
        assert choose(problem, name) is BACKENDS[name]
        return
    with pytest.raises(heedful.UnsupportedError) as refusal:
        choose(problem, name)
    assert tuple(refusal.value.reasons[name]) == verdict.reasons


def transformed(feature: str, call, q: Tensor, k: Tensor, v: Tensor, tangent: Tensor) -> Tensor:
    """What a transform of torch.func makes of a call, for one direction."""
    if feature == "gradient":
        return torch.func.grad(lambda t: (call(t, k, v) * tangent).sum())(q)
    if feature == "second_order":
        slope = torch.func.grad(lambda t: call(t, k, v).square().sum())
        return torch.func.grad(lambda t: (slope(t) * tangent).sum())(q)
    if feature == "forward_mode":
        return torch.func.jvp(lambda t: call(t, k, v), (q,), (tangent,))[1]
    return torch.vmap(lambda t: call(t, k, v))(torch.stack([q, tangent]))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("row", TRANSFORMS, ids=identity)
def test_transforms(row: Ask, name: str) -> None:
    verdict = verdict_of(row, name)
    skip_where_it_cannot_run(name)
    # In float64 where that runs: what two ways of differentiating differ in is far below the tolerance.
    double = torch.float64 in BACKENDS[name].dtypes
    q, k, v = (t[:1, :2, :9, :8] for t in inputs(row, name, torch.float64 if double else torch.float32))
    tangent = torch.randn_like(q)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return heedful.attention(q, k, v, backend=name)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, torch.ones(1, 1, 9, 9, dtype=torch.bool, device=q.device), scale=8**-0.5)[0]

    if verdict.forward:
        found, right = (transformed(row.name, f, q, k, v, tangent) for f in (call, formula))
        close = {"rtol": 1e-9, "atol": 1e-11} if double else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found, right, **close)
        return
    with pytest.raises(heedful.UnsupportedError) as refusal:
        transformed(row.name, call, q, k, v, tangent)
    assert set(refusal.value.reasons[name]) >= set(verdict.reasons)


def test_every_feature_that_a_problem_may_have_is_a_row() -> None:
    assert {name for row in asks() for name in row.features} == set(FEATURES)


def test_a_new_backend_is_a_new_column(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnlyForward(Backend):
        name = "only_forward"
        devices = frozenset({"cuda"})
        dtypes = frozenset({torch.bfloat16})
        max_head_dim = 128
        features = frozenset({"lse"})
        gradient = False

        def run(self, call):
            raise NotImplementedError

    monkeypatch.setitem(BACKENDS, "only_forward", OnlyForward())
    found = matrix()
    assert found.devices["only_forward"] == "cuda"
    column = {row: verdicts["only_forward"] for row, verdicts in found.backends.items()}
    assert word(column["bfloat16"]) == "forward"
    assert column["bfloat16"].gradient_reasons == ("does not support gradients",)
    assert column["float32"].reasons == ("takes bfloat16, not float32",)
    assert (word(column["lse"]), word(column["window"]), word(column["weights"])) == ("forward", "forward", "no")
    assert "only_forward (cuda)" in markdown(found)
    assert (
        found.doors["heedful.attention"].keys() == next(d for d in DOORS if d.name == "heedful.attention").says.keys()
    )


def test_the_forms_say_the_same() -> None:
    found = matrix()
    data = json.loads(json.dumps(found.to_json()))
    assert len([cell for cell in data["cells"] if cell["door"] is None]) == len(asks()) * len(BACKENDS)
    for cell in data["cells"]:
        assert cell["forward"] == (cell["reasons"] == [])
    assert tables(found)
    text = markdown(found, {door.name: "x.md" for door in DOORS})
    for door in DOORS:
        assert f"### {door.name}\n" in text
    for row in asks():
        assert f"| {row.title} |" in text

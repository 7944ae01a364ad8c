"""torch.ops.heedful.attention_backward, attention_weights and attention_weights_sparse: the engine as torch sees it."""

from __future__ import annotations

import pytest
import torch
from inputs import attention_inputs, tensor

from heedful.backend.native import library
from heedful.backend.reference.formula import attend
from heedful.dropout import keep_mask

library.load_operators()
operators = torch.ops.heedful

FULL: tuple[int, ...] = ()
# One atom of one term: the diagonal j - i is at most k_length - q_length.
CAUSAL = (1, 1, 0, 2, 1, 0, -2, 1, -1)
MASK = (1, 1, 5, 0)

SIZES = {"kv_heads": 2, "q_length": 21, "k_length": 30, "value_dim": 24}
PAIRS = (2, 4, 21, 30)


def causal(q_length: int, k_length: int) -> torch.Tensor:
    return torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length)[None, None]


class Case:
    """A forward call with every feature, its results by the formula in fp64, and the operators' arguments."""

    def __init__(self, dtype: torch.dtype = torch.float64, memory: str = "contiguous") -> None:
        self.query, self.key, self.value = attention_inputs(**SIZES, dtype=dtype, memory=memory)
        self.bias = torch.randn(1, 4, 21, 30).to(dtype)
        self.bias[:, 1, 3] = -torch.inf
        self.slopes, self.sinks = torch.rand(2, 4).to(dtype), torch.randn(4).to(dtype)
        self.seed = torch.tensor([2**40 + 3])
        self.features = (self.bias, self.slopes, 1.5, 0.3, self.seed)
        self.out, self.lse = operators.attention_forward(
            self.query, self.key, self.value, [], CAUSAL, 0.3, False, self.bias, self.slopes, self.sinks, 1.5, 0.3,
            self.seed,
        )  # fmt: skip

    def by_formula(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """out, lse and weights, and the leaves that they are differentiable in."""
        tensors = (self.query, self.key, self.value, self.bias, self.slopes, self.sinks)
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        kept = keep_mask(self.seed, 0.3, PAIRS).double() / 0.7
        q, k, v, bias, slopes, sinks = leaves
        found = attend(
            q, k, v, causal(21, 30), scale=0.3, softcap=1.5, bias=bias, alibi_slopes=slopes[:, :, None, None],
            sinks=sinks, kept=kept,
        )  # fmt: skip
        return list(found), leaves

    def backward(self, grad_out, grad_lse=None, grad_weights=None, bias_gradient=True, slopes_gradient=True):
        return operators.attention_backward(
            grad_out, self.query, self.key, self.value, self.out, self.lse, [], CAUSAL, 0.3, *self.features, grad_lse,
            grad_weights, bias_gradient, slopes_gradient,
        )  # fmt: skip


@pytest.mark.parametrize("through", ["out", "everything"])
def test_backward(through):
    case = Case()
    (out, lse, weights), leaves = case.by_formula()
    arriving = [torch.randn_like(t) for t in (out, lse, weights)]
    arriving[1:] = arriving[1:] if through == "everything" else [torch.zeros_like(lse), torch.zeros_like(weights)]
    wanted = torch.autograd.grad([out, lse.nan_to_num(neginf=0), weights], leaves, arriving)
    if through == "out":
        found = case.backward(arriving[0])
    else:
        row_sums = (weights.detach() * arriving[2]).sum(-1)
        found = case.backward(arriving[0], arriving[1] - row_sums, arriving[2])
    *inputs, delta, grad_bias, grad_slopes = found
    for ours, theirs in zip(inputs, wanted, strict=False):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad_bias.sum(0, keepdim=True), wanted[3])
    torch.testing.assert_close(grad_slopes.sum(-1), wanted[4])
    share = torch.exp(case.sinks[:, None] - case.lse)
    torch.testing.assert_close(-(share * delta).sum((0, 2)), wanted[5])


def test_what_is_not_asked_for_has_no_elements():
    case = Case()
    grad_out = torch.randn_like(case.out)
    *whole, _, _ = case.backward(grad_out)
    *some, grad_bias, grad_slopes = case.backward(grad_out, bias_gradient=False, slopes_gradient=False)
    assert grad_bias.shape == grad_slopes.shape == (0,)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(some, whole, strict=True))


@pytest.mark.parametrize("shape", [(2, 4, 21, 30), (1, 4, 1, 30), (2, 1, 21, 1), (1, 1, 1, 1)], ids=str)
def test_bias_that_broadcasts(shape):
    query, key, value = attention_inputs(**SIZES, dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted_out, lse, _ = attend(query, key, value, causal(21, 30), scale=0.3, bias=bias)
    grad_out = torch.randn_like(wanted_out)
    (wanted,) = torch.autograd.grad(wanted_out, bias, grad_out)
    found = operators.attention_backward(
        grad_out, query, key, value, wanted_out.detach(), lse.detach(), [], CAUSAL, 0.3, bias.detach(), None, 0.0, 0.0,
        None, None, None, True, False,
    )[4]  # fmt: skip
    assert found.shape == (*shape[:3], 30)
    torch.testing.assert_close(found.sum_to_size(shape), wanted)


@pytest.mark.parametrize("memory", ["contiguous", "blhd", "packed", "transposed", "expanded"])
def test_gradients_lie_as_what_they_are_of(memory):
    if memory == "packed":
        query, key, value = torch.randn(2, 21, 3, 4, 16).unbind(2)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    elif memory == "transposed":
        query, key, value = (torch.randn(2, 4, 16, 21).mT for _ in range(3))
    else:
        query, key, value = (tensor((2, 4, 21, 16), memory=memory) for _ in range(3))
    out, lse = operators.attention_forward(query, key, value, [], CAUSAL, 0.3, False)
    arguments = (torch.randn_like(out), query, key, value, out, lse, [], CAUSAL, 0.3, None, None, 0.0, 0.0, None, None)
    found = operators.attention_backward(*arguments, None, False, False)
    want = (21 * 64, 16, 64, 1) if memory in ("blhd", "packed") else (21 * 64, 21 * 16, 16, 1)
    assert [gradient.stride() for gradient in found[:3]] == [want] * 3
    torch.library.opcheck(operators.attention_backward.default, (*arguments, None, False, False), raise_exception=True)


def test_expanded_gradients_arrive():
    case = Case()
    dense = case.backward(torch.full_like(case.out, 2.0), torch.full_like(case.lse, 3.0))
    expanded = case.backward(torch.tensor(2.0).double().expand_as(case.out), torch.full_like(case.lse, 3.0))
    for ours, theirs in zip(expanded, dense, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_backward(dtype):
    case = Case(dtype)
    options = {"raise_exception": True}
    backward = operators.attention_backward.default
    start = (torch.randn_like(case.out), case.query, case.key, case.value, case.out, case.lse)
    weights = torch.randn(PAIRS).to(dtype)
    torch.library.opcheck(backward, (*start, [], CAUSAL, 0.3, *case.features, case.lse, weights, True, True), **options)
    torch.library.opcheck(
        backward, (*start, [], FULL, 0.3, None, None, 0.0, 0.0, None, None, None, False, False), **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("memory", ["contiguous", "blhd"])
def test_weights(dtype, memory):
    case = Case(dtype, memory)
    (_, _, wanted), _ = case.by_formula()
    wanted = wanted.detach()
    start = (case.query, case.key, case.lse, [], CAUSAL, 0.3)
    dense = operators.attention_weights(*start, *case.features)
    assert dense.dtype == dtype
    assert dense.is_contiguous()
    torch.testing.assert_close(dense, wanted.to(dtype), rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    indices, values = operators.attention_weights_sparse(*start, *case.features)
    attended = (causal(21, 30) & (case.bias != -torch.inf)).expand(PAIRS)
    assert torch.equal(indices, attended.nonzero().T)
    assert torch.equal(values, dense[attended])
    assert not dense[~attended].any()
    for name in ("attention_weights", "attention_weights_sparse"):
        torch.library.opcheck(getattr(operators, name).default, (*start, *case.features), raise_exception=True)


def test_weights_with_positions_of_their_own():
    query, key, value = attention_inputs(**SIZES, dtype=torch.float64)
    slopes, offset = torch.rand(1, 4, dtype=torch.float64), torch.tensor([3, -8], dtype=torch.int32)
    _, lse, wanted = attend(
        query, key, value, causal(21, 30), scale=0.3, alibi_slopes=slopes[:, :, None, None], query_offset=offset
    )
    found = operators.attention_weights(query, key, lse, [], CAUSAL, 0.3, None, slopes, 0.0, 0.0, None, offset)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("how", ["no pair", "no batch item", "no query"])
def test_weights_of_nothing(how):
    sizes = {"no batch item": {"batch": 0}, "no query": {"q_length": 0}}.get(how, {})
    query, key, _ = attention_inputs(**{"q_length": 5, "k_length": 6} | sizes)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool).expand(1, 1, query.shape[2], 6)
    lse = torch.full(query.shape[:3], -torch.inf)
    arguments = (query, key, lse, [mask.contiguous()], MASK, 0.3, None, None, 0.0, 0.0, None)
    indices, values = operators.attention_weights_sparse(*arguments)
    assert (indices.shape, values.shape) == ((4, 0), (0,))
    assert (operators.attention_weights(*arguments) == 0).all()
    torch.library.opcheck(operators.attention_weights_sparse.default, arguments, raise_exception=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad_out": torch.zeros(2, 4, 21, 23)}, "grad_out"),
        ({"grad_out": torch.zeros(2, 4, 21, 24, dtype=torch.bfloat16)}, "grad_out"),
        ({"out": torch.zeros(2, 4, 20, 24)}, "out"),
        ({"lse": torch.zeros(2, 4, 22)}, "lse"),
        ({"lse": torch.zeros(2, 4, 42)[..., ::2]}, "lse"),
        ({"grad_lse": torch.zeros(()).expand(2, 4, 21)}, "grad_lse"),
        ({"grad_weights": torch.zeros(2, 4, 21, 31)}, "grad_weights"),
        ({"query": torch.zeros(4, 21, 16)}, "query has 3 dimensions"),
        ({"bias_gradient": True}, "bias_gradient takes a bias"),
        ({"bias_gradient": True, "bias": torch.zeros(21, 30)}, "bias"),
        ({"slopes_gradient": True}, "slopes_gradient takes alibi_slopes"),
        ({"dropout_p": 0.5}, "seed is None"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(change, message):
    query, key, value = attention_inputs(**SIZES)
    out, lse = operators.attention_forward(query, key, value, [], FULL, 0.3, False)
    arguments = {
        "grad_out": torch.zeros_like(out), "query": query, "key": key, "value": value, "out": out, "lse": lse,
        "operands": [], "schedule": FULL, "scale": 0.3, "bias": None, "alibi_slopes": None, "softcap": 0.0,
        "dropout_p": 0.0, "seed": None, "grad_lse": None, "grad_weights": None, "bias_gradient": False,
        "slopes_gradient": False,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        operators.attention_backward(**arguments | change)

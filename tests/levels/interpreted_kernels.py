"""The numbers of level 4's kernels under Triton's interpreter; test_triton_kernels.py runs this on its own.

TRITON_INTERPRET=1 python -m pytest tests/levels/interpreted_kernels.py
"""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def compare(function, formula, inputs, *others) -> None:
    """Output and gradients against the formula in fp64, within some roundings of the largest values that arise."""
    dtype = inputs[0].dtype
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = function(*inputs, *others), formula(*exact, *others)
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    upstream = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(out, inputs, upstream)
    wanted_gradients = torch.autograd.grad(wanted, exact, upstream.double())
    # Sums over n terms round n times at most; results round once more to their own type.
    terms = 8 + max(x.numel() // x.shape[-1] + x.shape[-1] for x in inputs)
    # The interpreter cuts float32 to bfloat16 where a GPU rounds.
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    inner = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    for found, reference in zip([out, *gradients], [wanted, *wanted_gradients], strict=True):
        assert found.dtype == dtype
        size = reference.detach().abs()
        bound = rounding * size + 4 * inner * terms * size.max()
        worst = ((found.detach().double() - reference.detach()).abs() - bound).max()
        assert worst <= 0, f"beyond the bound by {float(worst):.3g}, largest value {float(size.max()):.3g}"


def layer_norm_formula(x, weight, bias, eps, activate):
    y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias, eps)
    return torch.nn.functional.gelu(y) if activate else y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activate", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (3, 113), (2, 5, 64)])
def test_layer_norm(shape, activate, dtype) -> None:
    from heedful.levels.triton_kernels.launch import layer_norm

    inputs = leaves(shape, shape[-1:], shape[-1:], dtype=dtype)
    compare(lambda x, w, b: layer_norm(x, w, b, 1e-3, activate=activate),
            lambda x, w, b: layer_norm_formula(x, w, b, 1e-3, activate), inputs)  # fmt: skip


def test_layer_norm_of_one_column_is_its_bias() -> None:
    from heedful.levels.triton_kernels.launch import layer_norm

    x, weight, bias = leaves((3, 1), (1,), (1,), dtype=torch.float32)
    out = layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(out, bias.expand(3, 1))
    into_x, into_weight, into_bias = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert into_x.abs().max() < 1e-5
    assert into_weight.abs().max() < 1e-5
    torch.testing.assert_close(into_bias, torch.full((1,), 3.0))


def test_layer_norm_sums_more_rows_than_partial_sums(monkeypatch) -> None:
    from heedful.levels.triton_kernels import launch

    monkeypatch.setattr(launch, "PARTIAL_SUMS", 3)
    inputs = leaves((11, 7), (7,), (7,), dtype=torch.float32)
    compare(lambda x, w, b: launch.layer_norm(x, w, b, 1e-5), lambda *a: layer_norm_formula(*a, 1e-5, False), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 239), (2, 3, 400)])
def test_gelu(shape, dtype) -> None:
    from heedful.levels.triton_kernels.launch import gelu

    compare(gelu, torch.nn.functional.gelu, leaves(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 113, 1030])
def test_swiglu_of_one_projection(columns, dtype) -> None:
    from heedful.levels.triton_kernels.launch import swiglu

    def formula(x):
        gate, up = x.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    compare(swiglu, formula, leaves((2, 3, 2 * columns), dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, dim", [(1, 2), (17, 8), (3, 26)])
def test_rope_of_strided_heads(length, dim, dtype) -> None:
    from heedful.levels import level_1_pytorch
    from heedful.levels.triton_kernels.launch import rope

    table = torch.randn(2, length + 2, dim // 2, dtype=torch.float64)
    if dtype != torch.float64:
        table = table.float()
    cos, sin = table[:, 2:]
    # As q is within a packed projection: (B, L, H, D) turned.
    x = leaves((2, length, 3, dim), dtype=dtype)
    compare(lambda x: rope(x.transpose(1, 2), cos, sin),
            lambda x: level_1_pytorch.rope(x.transpose(1, 2), cos.double(), sin.double()), x)  # fmt: skip


def test_expanded_gradients_and_inputs_with_other_strides() -> None:
    from heedful.levels.triton_kernels.launch import gelu, layer_norm

    x = torch.randn(5, 6).t().requires_grad_()
    weight, bias = torch.randn(2, 5)
    for function, formula in (
        (gelu, torch.nn.functional.gelu),
        (lambda x: layer_norm(x, weight, bias, 1e-5), lambda x: layer_norm_formula(x, weight, bias, 1e-5, False)),
    ):
        (found,) = torch.autograd.grad(function(x).sum(), x)
        (wanted,) = torch.autograd.grad(formula(x).sum(), x)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_in_nothing_out_and_rows_that_are_too_long() -> None:
    from heedful.levels.triton_kernels import launch

    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4)
    out = launch.layer_norm(torch.empty(0, 4), weight, bias, 1e-5)
    assert out.shape == (0, 4)
    assert torch.autograd.grad(out.sum(), weight)[0].eq(0).all()
    assert launch.gelu(torch.empty(0, 3)).shape == (0, 3)
    assert launch.swiglu(torch.empty(0, 6)).shape == (0, 3)
    with pytest.raises(ValueError, match="at most 16384 at level 4"):
        launch.layer_norm(torch.empty(1, 20000), torch.ones(20000), torch.ones(20000), 1e-5)


@pytest.mark.parametrize(
    "component, arguments",
    [
        ("layer_norm", {"dim": 24}),
        ("layer_norm_gelu", {"dim": 24}),
        ("feed_forward", {"dim": 24, "hidden": 20}),
        ("feed_forward", {"dim": 24, "hidden": 20, "activation": "swiglu"}),
    ],
)
def test_level_4_is_equivalent_to_the_others(component, arguments) -> None:
    from heedful import levels

    first = levels.create(component, 1, **arguments)
    modules = {f"level {level}": levels.convert(first, level) for level in (1, 5, 4)}
    found = levels.compare_optimization_levels(modules, (2, 7, 24), seconds=0.0)
    assert found.equivalent, found
    assert found["level 4"].forward_seconds is None
    assert "interpreter" in found["level 4"].note


def test_attention_at_level_4_runs_or_says_why_not() -> None:
    import heedful
    from heedful import levels

    status = levels.available(4, "attention")
    shapes = [(1, 2, 5, 16)] * 3
    if not status:
        assert "backend" in status.reason
        with pytest.raises(heedful.UnsupportedError, match="level 4"):
            levels.create("attention", 4)
        return
    first = levels.create("attention", 1, causal=True)
    assert levels.compare_optimization_levels({"1": first, "4": levels.convert(first, 4)}, shapes).equivalent
    decoder = levels.create("decoder", 1, vocabulary=11, dim=32, heads=2, layers=1, hidden=16, max_length=16)
    prompt = torch.randint(11, (2, 3))
    assert torch.equal(levels.convert(decoder, 4).generate(prompt, 3), decoder.generate(prompt, 3))

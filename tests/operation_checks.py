"""What every operation of heedful.ops has to pass. A test file has a class that inherits from OperationChecks, says how
calls are made and how large the terms of their results are, and adds what is special."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import Bounded
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import heedful
from heedful.ops import catalogue

MARGIN = 8.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEMORY = ("contiguous", "transposed", "sliced", "expanded", "last-strided")

Call = dict[str, Any]


def in_memory(tensor: Tensor, memory: str) -> Tensor:
    """The same values, save for "expanded", with strides as the word says."""
    unused = torch.nan if tensor.is_floating_point() else -1
    if memory == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if memory == "sliced" and tensor.ndim:
        whole = tensor.new_full([size + 3 for size in tensor.shape], unused)
        view = whole[tuple(slice(1, size + 1) for size in tensor.shape)]
        return view.copy_(tensor)
    if memory == "expanded" and tensor.ndim:
        return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
    if memory == "last-strided" and tensor.ndim:
        return torch.stack([tensor, torch.full_like(tensor, unused)], -1)[..., 0]
    return tensor.contiguous()


def poison(*tensors: Tensor) -> None:
    """Leaves NaN in the memory that outputs of these sizes are likely to get next."""
    _ = [torch.full((tensor.numel(),), torch.nan, dtype=tensor.dtype) for tensor in tensors for _ in range(3)]


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


class OperationChecks:
    name: str
    variants: tuple[str, ...] = ("plain",)
    shapes: tuple[tuple[int, ...], ...] = ((1,), (3,), (113,), (2, 3, 5), (7, 239))
    strided: tuple[int, ...] = (3, 5, 17)
    """The shape of calls whose tensors lie in memory in every way."""
    small: tuple[int, ...] = (2, 3)
    """Of gradcheck's calls."""
    large: tuple[int, ...] = (3, 40007)
    """More than one work item."""
    same_bits: bool = True
    """Whether results are the same bits with and without a gradient and for any number of threads."""
    compiled_bits: bool = True
    """Whether they are where Inductor compiles what is around the operators."""
    empty: tuple[tuple[int, ...], ...] = ((0,), (3, 0), (0, 3))

    def make(self, variant: str, shape: tuple[int, ...], dtype: torch.dtype) -> Call:
        """The keyword arguments of a call, fresh and random."""
        raise NotImplementedError

    def errors(self, variant: str, call: Call, upstream: tuple[Tensor, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """In units of the roundoff of the type that is computed in, how far each output and each gradient may be from
        the reference beside its own rounding; of a call in float64."""
        raise NotImplementedError

    def reference_errors(self, variant: str, call: Call, upstream: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """In units of float64's roundoff, how far the reference's own gradients, or "output 0" and so on, may be from
        the truth, for those where it loses more than the engine does."""
        return {}

    def operator_calls(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Names of operators, each with arguments for opcheck."""
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        choices: dict[str, tuple[tuple[Any, ...], Callable[[Any], str]]] = {
            "variant": (self.variants, str),
            "shape": (self.shapes, lambda shape: "x".join(map(str, shape))),
            "dtype": (DTYPES, lambda dtype: str(dtype).removeprefix("torch.")),
            "memory": (MEMORY, str),
            "empty_shape": (self.empty, lambda shape: "x".join(map(str, shape))),
            "operator_call": (
                tuple(self.operator_calls()) if "operator_call" in metafunc.fixturenames else (),
                lambda call: str(call[0]),
            ),
        }
        for fixture, (values, name) in choices.items():
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, values, ids=name)

    # What the checks share.

    @property
    def operation(self) -> Any:
        return catalogue()[self.name]

    def leaves(self, call: Call) -> dict[str, Tensor]:
        """The tensors of a call that have gradients."""
        given = {n: call.get(n) for n in self.operation.gradients}
        return {n: t for n, t in given.items() if isinstance(t, Tensor) and t.is_floating_point()}

    def run(
        self, call: Call, upstream: tuple[Tensor, ...] | None = None, function: Callable[..., Any] | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor], tuple[Tensor, ...]]:
        """Outputs, gradients by argument, and what arrived at the outputs; leaves keep their strides."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.leaves(call).items()}
        outputs = as_tuple((function or self.operation.function)(**{**call, **leaves}))
        if upstream is None:
            upstream = tuple(torch.randn_like(output) for output in outputs)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        return tuple(y.detach() for y in outputs), dict(zip(leaves, gradients, strict=True)), upstream

    def compare(self, variant: str, call: Call) -> None:
        """Runs the call with and without gradients and holds all that it gives against the reference in float64."""
        poison(*self.leaves(call).values())
        found, gradients, upstream = self.run(call)
        with torch.no_grad():
            poison(*found)
            alone = as_tuple(self.operation.function(**call))
        wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()}
        wide_upstream = tuple(dy.double() for dy in upstream)
        wanted, wanted_gradients, _ = self.run(wide, wide_upstream, self.operation.reference)
        sizes, gradient_sizes = self.errors(variant, wide, wide_upstream)
        lost = self.reference_errors(variant, wide, wide_upstream)
        for index, (y, ref, size) in enumerate(zip(found, wanted, sizes, strict=True)):
            slack = 2.0**-53 * lost[f"output {index}"] if f"output {index}" in lost else 0.0
            self.check(y, ref, size, f"output {index}", slack)
            if self.same_bits:
                assert torch.equal(y.nan_to_num(), alone[index].nan_to_num()), "another result without a gradient"
            else:
                self.check(alone[index], ref, size, f"output {index} without a gradient", slack)
        assert set(gradients) == set(wanted_gradients)
        for name, gradient in gradients.items():
            assert gradient.dtype == call[name].dtype
            slack = 2.0**-53 * lost[name] if name in lost else 0.0
            self.check(gradient, wanted_gradients[name], gradient_sizes[name], f"gradient of {name}", slack)

    def check(self, found: Tensor, wanted: Tensor, size: Tensor, what: str, slack: Tensor | float = 0.0) -> None:
        computed = torch.finfo(torch.float64 if found.dtype == torch.float64 else torch.float32)
        own = torch.finfo(found.dtype)
        bound = MARGIN * (own.eps / 2 * wanted.abs() + computed.eps / 2 * size + slack + computed.smallest_normal)
        Bounded(wanted, bound + own.smallest_normal * own.eps).check(found, f"{self.name}: {what}")

    # The checks.

    def test_against_the_reference(self, variant, shape, dtype):
        self.compare(variant, self.make(variant, shape, dtype))

    def test_strides(self, variant, memory, dtype):
        call = self.make(variant, self.strided, dtype)
        self.compare(variant, {n: in_memory(v, memory) if isinstance(v, Tensor) else v for n, v in call.items()})

    def test_expanded_gradients_arrive(self, variant):
        call = self.make(variant, self.strided, torch.float32)
        outputs, _, _ = self.run(call)
        upstream = tuple(torch.randn(()).expand_as(output) for output in outputs)
        _, expanded, _ = self.run(call, upstream)
        _, dense, _ = self.run(call, tuple(dy.contiguous() for dy in upstream))
        for name, gradient in expanded.items():
            torch.testing.assert_close(gradient, dense[name])

    def test_empty(self, variant, empty_shape):
        call = self.make(variant, empty_shape, torch.float32)
        found, gradients, upstream = self.run(call)
        wanted, wanted_gradients, _ = self.run(call, upstream, self.operation.reference)
        assert all(torch.equal(y, ref) for y, ref in zip(found, wanted, strict=True))
        assert all(torch.equal(gradient, wanted_gradients[name]) for name, gradient in gradients.items())

    def test_gradcheck(self, variant):
        """Also of the gradients: what the operators do not give goes through the composition."""
        call = self.make(variant, self.small, torch.float64)
        leaves = {name: tensor.requires_grad_() for name, tensor in self.leaves(call).items()}

        def function(*tensors: Tensor) -> Any:
            return self.operation.function(**{**call, **dict(zip(leaves, tensors, strict=True))})

        assert gradcheck(function, tuple(leaves.values()))
        assert gradgradcheck(function, tuple(leaves.values()))

    def test_opcheck(self, operator_call):
        name, arguments = operator_call
        torch.library.opcheck(getattr(torch.ops.heedful, name).default, arguments)

    def test_threads_give_the_same_bits(self, variant, dtype):
        if not self.same_bits:
            pytest.skip("bits are those of PyTorch's matrix products")
        call = self.make(variant, self.large, dtype)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            outputs, gradients, upstream = self.run(call)
            for threads in (2, 3):
                torch.set_num_threads(threads)
                again, gradients_again, _ = self.run(call, upstream)
                assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
                assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
        finally:
            torch.set_num_threads(before)

    def test_large(self, variant, dtype):
        self.compare(variant, self.make(variant, self.large, dtype))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_whole(self, variant, dynamic):
        torch._dynamo.reset()
        compiled = torch.compile(self.operation.function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=dynamic):
            for shape in (self.strided, tuple(size + 2 for size in self.strided)):
                call = self.make(variant, shape, torch.float32)
                outputs, gradients, upstream = self.run(call)
                again, gradients_again, _ = self.run(call, upstream, compiled)
                assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
                for name in gradients:
                    torch.testing.assert_close(gradients[name], gradients_again[name])

    def test_inductor(self, variant):
        torch._dynamo.reset()
        call = self.make(variant, self.strided, torch.float32)
        outputs, gradients, upstream = self.run(call)
        again, gradients_again, _ = self.run(call, upstream, torch.compile(self.operation.function, fullgraph=True))
        for a, b in zip(outputs, again, strict=True):
            assert torch.equal(a, b) if self.compiled_bits else torch.allclose(a, b)
        for name in gradients:
            torch.testing.assert_close(gradients[name], gradients_again[name])

    def test_other_devices_and_transforms_take_the_composition(self, variant, caplog):
        from heedful.ops import _dispatch

        _dispatch._said.clear()
        call = self.make(variant, self.small, torch.float64)
        leaves = self.leaves(call)
        primals = tuple(leaves.values())

        def function(*tensors: Tensor) -> Any:
            return self.operation.function(**{**call, **dict(zip(leaves, tensors, strict=True))})

        wanted = as_tuple(function(*primals))
        with caplog.at_level("WARNING", "heedful"):
            stacked = as_tuple(torch.vmap(function)(*(torch.stack([p, p]) for p in primals)))
            stacked = as_tuple(torch.vmap(function)(*(torch.stack([p, p]) for p in primals)))
        assert caplog.text.count("transform of torch.func") == 1
        for found, output in zip(stacked, wanted, strict=True):
            torch.testing.assert_close(found, torch.stack([output, output]))
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            duals = tuple(forward_ad.make_dual(p, torch.ones_like(p)) for p in primals)
            assert all(forward_ad.unpack_dual(y).tangent is not None for y in as_tuple(function(*duals)))
        meta = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in call.items()}
        on_meta = as_tuple(self.operation.function(**meta))
        assert [y.shape for y in on_meta] == [y.shape for y in wanted]

    def test_facts(self):
        operation = self.operation
        assert operation.function is getattr(heedful.ops, self.name)
        arguments = [argument.name for argument in (*operation.inputs, *operation.parameters)]
        assert sorted(arguments) == sorted(inspect.signature(operation.function).parameters)
        assert sorted(arguments) == sorted(inspect.signature(operation.reference).parameters)
        assert set(operation.gradients) <= {argument.name for argument in operation.inputs}
        assert all(hasattr(torch.ops.heedful, name) for name in operation.operators)
        assert operation.module is None or issubclass(getattr(heedful.nn, operation.module), torch.nn.Module)
        assert json.loads(json.dumps(operation.to_json()))["name"] == self.name
        case = operation.cases[0]
        call = case.inputs(torch.float32)
        for backward in (False, True):
            cost = operation.cost(call, backward)
            assert cost.flops > 0
            assert cost.bytes > 0
        wanted = as_tuple(operation.reference(**call))
        for peer in case.peers.values():
            for found, ref in zip(as_tuple(peer(**call)), wanted, strict=True):
                torch.testing.assert_close(found, ref)

"""`capture`: a model as CUDA graphs, one for each form of its inputs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from heedful.arguments import autocast_dtype
from heedful.errors import unsupported, wrong_type, wrong_value
from heedful.graphs.buckets import Buckets
from heedful.graphs.cuda import CudaGraphs, Device, Graph
from heedful.graphs.errors import capture_error
from heedful.graphs.watch import Finding, Stack, run_watched
from heedful.graphs.weights import Weights
from heedful.patterns.arguments import describe, integer
from heedful.patterns.moved import holding

# The first run makes what is made once, such as tables and compiled kernels; the second is watched; the third finds
# every cache as a capture will find it.
_FEWEST_RUNS = 3


class _Form(NamedTuple):
    """A call without the contents of its tensors."""

    structure: Any
    leaves: tuple[Hashable, ...]
    """Shape and dtype of each tensor, the place of its first mention instead where it is there again, or the value."""
    autocast: Hashable


class _Replay(NamedTuple):
    graph: Graph
    inputs: tuple[Tensor, ...]
    """What replays read, one for each different tensor of the call."""
    outputs: Any
    held: tuple[Tensor, ...]
    """What else they read: it must live as long as they do."""
    findings: tuple[Finding, ...]


def capture(
    model: Callable[..., Any],
    sample: Tensor | tuple[Any, ...] | dict[str, Any],
    *,
    buckets: Buckets | None = None,
    limit: int = 8,
    warmup: int = _FEWEST_RUNS,
    modules: Sequence[nn.Module] = (),
    generators: Sequence[torch.Generator] = (),
    copy_outputs: bool = True,
    watch_weights: bool = True,
    device: Device | None = None,
) -> Captured:
    """A callable that gives what `model` gives, by replaying a CUDA graph: one launch for all of its kernels.

    Every call is for inference, as under `torch.no_grad()`: results carry no gradients, and a backward pass through
    them is refused. The first call of each form captures a graph; a form is the nesting of the inputs, the shapes and
    dtypes of their tensors, all their other values, and autocast's state. Inputs are copied into the graph's own, so
    that callers may pass any tensors of the form.

    What a capture freezes: everything that Python decides from something else than the inputs' form (values of the
    model's attributes, global switches, hooks). Weights that are written in place are read anew by every replay; those
    that have been put elsewhere, modules that have been replaced and `train()` are noticed, and captured anew.

    Args:
        model: a module, or a function of one or several.
        sample: inputs to capture at once: a tensor, a tuple of positional or a dict of keyword arguments, nested as
            the model takes them. Tensors lie on one CUDA device, at least one is there.
        buckets: pads inputs up to a few sizes that share their graphs; None has a graph for each size.
        limit: graphs to keep, 1 or more; where there are more the least recently used one goes.
        warmup: runs before a capture, at least 3. They are real: a model that counts its calls counts these too.
        modules: what else than `model` has weights that it reads; needed for functions, whose modules are not known.
        generators: CUDA generators, other than PyTorch's own for the device, that the model draws from.
        copy_outputs: False returns the graph's own outputs, which the next call overwrites.
        watch_weights: False leaves out looking where weights are, 0.1 µs each; call `reset` after moving them.
        device: what captures, in place of CUDA; for tests.

    Returns:
        A `Captured`. Its calls may come from several threads, one of which replays at a time, and from several streams,
        which then wait for each other: graphs of one model share their memory.

    Raises:
        UnsupportedError: there is no CUDA here; `.reasons` says why.
        CaptureError: the model does what no graph can hold; `.where` and `.findings` say where and what.
        TypeError, ValueError: an argument is wrong.
    """
    if not callable(model):
        raise wrong_type("model", describe(model), "a module or a function")
    captured = Captured(
        model, buckets, limit, warmup, modules, generators, copy_outputs, watch_weights, device or CudaGraphs()
    )
    captured.prepare(*_arguments(sample)[0], **_arguments(sample)[1])
    return captured


class Captured:
    """What `capture` returns; called as the model is."""

    def __init__(
        self,
        model: Callable[..., Any],
        buckets: Buckets | None,
        limit: int,
        warmup: int,
        modules: Sequence[nn.Module],
        generators: Sequence[torch.Generator],
        copy_outputs: bool,
        watch_weights: bool,
        device: Device,
    ) -> None:
        why = device.why_not()
        if why is not None:
            raise unsupported("CUDA graphs cannot be captured here", {"cuda": [why]})
        if buckets is not None and not isinstance(buckets, Buckets):
            raise wrong_type("buckets", describe(buckets), "a heedful.graphs.Buckets or None")
        self.model, self.buckets = model, buckets
        self.limit = integer("limit", limit, 1)
        self.warmup = integer("warmup", warmup, _FEWEST_RUNS)
        for module in modules:
            if not isinstance(module, nn.Module):
                raise wrong_type("modules", describe(module), "modules")
        owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
        self._modules = (*((owner,) if isinstance(owner, nn.Module) else ()), *modules)
        self._generators, self._copy, self._watch, self._backend = generators, copy_outputs, watch_weights, device
        self._lock = threading.RLock()
        self._replays: OrderedDict[_Form, _Replay] = OrderedDict()
        self._weights = Weights(self._modules)
        self._device: torch.device | None = None
        self._pool: Any = None
        self._last_stream: Any = None
        self.captures = 0
        """Captures so far, those after evictions and changed weights among them."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives for these inputs.

        Raises:
            TypeError, ValueError, CaptureError: as `capture`.
        """
        buckets = self.buckets
        if buckets is None:
            return self._call(args, kwargs, None)
        size = buckets.size_of(args, kwargs)
        bucket = buckets.bucket(size)
        if bucket != size:
            args, kwargs = buckets.padded(args, kwargs, bucket)
        return self._call(args, kwargs, (size, bucket))

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures the graph for inputs of this form, where it is not there yet.

        Raises:
            TypeError, ValueError, CaptureError: as `capture`.
        """
        if self.buckets is not None:
            bucket = self.buckets.bucket(self.buckets.size_of(args, kwargs))
            args, kwargs = self.buckets.padded(args, kwargs, bucket)
        tensors, form = self._form(args, kwargs)
        with self._lock:
            self._find(form, tensors, args, kwargs)

    def reset(self) -> None:
        """Forgets all graphs and gives back their memory; the next calls capture anew."""
        with self._lock:
            self._forget()

    @property
    def device(self) -> torch.device | None:
        """Where the graphs run; None while there are none."""
        return self._device

    def synchronize(self) -> None:
        """Waits until the device has done what it was given."""
        if self._device is not None:
            self._backend.synchronize(self._device)

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._replays)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the last watched run of each kept graph did that a graph cannot hold, or keeps as it was: work on the
        CPU that the capture went through with nevertheless."""
        return tuple({finding: None for replay in self._replays.values() for finding in replay.findings})

    def __repr__(self) -> str:
        return f"Captured({self._what}, {len(self)} of at most {self.limit} graphs)"

    @property
    def _what(self) -> str:
        return getattr(self.model, "__qualname__", type(self.model).__name__)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: tuple[int, int] | None) -> Any:
        tensors, form = self._form(args, kwargs)
        with self._lock:
            replay = self._find(form, tensors, args, kwargs)
            assert self._device is not None
            stream = self._backend.stream(self._device)
            if stream != self._last_stream:
                if self._last_stream is not None:
                    self._backend.wait_for(self._last_stream, self._device)
                self._last_stream = stream
            with torch.no_grad():
                for mine, given in zip(replay.inputs, tensors, strict=True):
                    mine.copy_(given)
                replay.graph.replay()
                outputs = replay.outputs
                if sizes is not None:
                    outputs = self.buckets.cut(outputs, *sizes)  # type: ignore[union-attr]
                if self._copy:
                    outputs = outputs.clone() if type(outputs) is Tensor else tree_map_only(Tensor, _clone, outputs)
        if torch.is_grad_enabled() and (self._weights.need_gradient or any(tensor.requires_grad for tensor in tensors)):
            return tree_map_only(Tensor, _refuse_backward, outputs)
        return outputs

    def _form(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], _Form]:
        """The different tensors of a call, and its form."""
        leaves, structure = tree_flatten((args, kwargs)) if kwargs or not _are_tensors(args) else (args, len(args))
        tensors: list[Tensor] = []
        described: list[Hashable] = []
        places: dict[int, int] = {}
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                described.append((type(leaf), leaf))
            elif id(leaf) in places:
                described.append(places[id(leaf)])
            else:
                places[id(leaf)] = len(tensors)
                tensors.append(leaf)
                described.append((leaf.shape, leaf.dtype))
        form = _Form(structure, tuple(described), self._autocast())
        try:
            hash(form)
        except TypeError:
            wrong = next(leaf for leaf in leaves if not isinstance(leaf, Tensor) and not _is_hashable(leaf))
            raise wrong_type(
                "inputs", describe(wrong), "tensors and hashable values, in tuples, lists and dicts"
            ) from None
        self._check(tensors)
        return tensors, form

    def _autocast(self) -> Hashable:
        return autocast_dtype(self._backend.type)

    def _check(self, tensors: list[Tensor]) -> None:
        if not tensors:
            raise wrong_value("inputs", "no tensor", "one tensor or more")
        wanted = self._device
        for tensor in tensors:
            device = tensor.device
            if device != wanted:
                if wanted is not None or device.type != self._backend.type:
                    takes = f"tensors on {wanted or 'a device of type ' + self._backend.type}"
                    raise wrong_value("inputs", f"a tensor {tuple(tensor.shape)} on {device}", takes)
                wanted = device
            if tensor.layout != torch.strided or tensor.is_nested:
                raise wrong_type("inputs", "a nested or sparse tensor", "strided tensors")

    def _find(self, form: _Form, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Replay:
        if self._watch and self._replays and self._weights.changed():
            self._forget()
        replay = self._replays.get(form)
        if replay is None:
            if not self._replays:
                self._weights = Weights(self._modules)
            while len(self._replays) >= self.limit:
                # It may still be at work.
                self._backend.synchronize(tensors[0].device)
                self._replays.popitem(last=False)
            replay = self._replays[form] = self._capture(form, tensors, args, kwargs)
        else:
            self._replays.move_to_end(form)
        return replay

    def _forget(self) -> None:
        # A replay may still be at work in the memory that goes back.
        if self._replays and self._device is not None:
            self._backend.synchronize(self._device)
        self._replays.clear()
        self._pool = self._last_stream = self._device = None

    def _capture(self, form: _Form, tensors: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Replay:
        device = tensors[0].device
        with torch.inference_mode(False), torch.no_grad():
            mine = {id(tensor): torch.empty_like(tensor, requires_grad=False).copy_(tensor) for tensor in tensors}
        inputs = tuple([mine[id(tensor)] for tensor in tensors])
        leaves, structure = tree_flatten((args, kwargs))
        static_args, static_kwargs = tree_unflatten([mine.get(id(leaf), leaf) for leaf in leaves], structure)
        casts = form.autocast

        def run() -> Any:
            # Autocast's cache would keep casts of weights as they are now, in memory that it frees when it ends.
            autocast = torch.autocast(self._backend.type, casts, enabled=casts is not None, cache_enabled=False)  # type: ignore[arg-type]
            with torch.inference_mode(False), torch.no_grad(), autocast:
                return self.model(*static_args, **static_kwargs)

        seen: tuple[tuple[Tensor, ...], tuple[Finding, ...]] = (), ()

        def warm_up() -> None:
            nonlocal seen
            for turn in range(self.warmup):
                if turn == 1:
                    seen = run_watched(run, self._backend.type, self._modules)
                else:
                    run()

        self._backend.aside(warm_up, device)
        if self._pool is None:
            self._pool = self._backend.pool()
        outside, findings = seen
        stack = Stack(self._modules)
        try:
            with stack.followed(), holding() as operands:
                graph, outputs = self._backend.capture(run, device, self._pool, self._generators)
        except Exception as error:
            # What a broken capture leaves in its memory is not known.
            self._pool = None
            shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in tensors)
            raise capture_error(f"{self._what} on inputs {shapes}", error, stack.top, findings) from error
        self.captures += 1
        self._device = device
        return _Replay(graph, inputs, outputs, (*outside, *operands), findings)


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, needs: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "a graph of heedful.graphs.capture has no backward pass; torch.cuda.make_graphed_callables captures a "
            "module with its backward"
        )


def _refuse_backward(result: Tensor) -> Tensor:
    if not (result.is_floating_point() or result.is_complex()):
        return result
    refused: Tensor = _NoBackward.apply(result, torch.empty(0, requires_grad=True))  # type: ignore[no-untyped-call]
    return refused


def _arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Tensor):
        return (sample,), {}
    if isinstance(sample, tuple):
        return sample, {}
    if isinstance(sample, dict) and all(isinstance(name, str) for name in sample):
        return (), sample
    raise wrong_type("sample", describe(sample), "a tensor, a tuple of arguments, or a dict of keyword arguments")


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _are_tensors(args: tuple[Any, ...]) -> bool:
    return all(type(argument) is Tensor for argument in args)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True

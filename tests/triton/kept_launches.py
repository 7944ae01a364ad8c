"""What the bridge launches, against what triton was given, through a driver that only remembers; run by test_kept.py.

python kept_launches.py FOLDER, which libcuda.so.1 was made in from driver_stub.c and LD_LIBRARY_PATH names.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch
import triton
from compiled import Offline

from heedful import Causal, Documents, Full, SlidingWindow, choose
from heedful.backend.triton import gradients, kept, launch, shortcuts
from heedful.backend.triton.work import Work

assert "native" not in choose.UNAVAILABLE
stub = ctypes.CDLL(str(Path(sys.argv[1]) / "libcuda.so.1"))
sizes = ((ctypes.c_size_t * 256) * 8).in_dll(stub, "stub_sizes")
counts = (ctypes.c_size_t * 8).in_dll(stub, "stub_counts")
launches = ctypes.c_int.in_dll(stub, "stub_launches")
shapes = ((ctypes.c_uint64 * 7) * 64).in_dll(stub, "stub_shapes")
parameters = (((ctypes.c_ubyte * 128) * 256) * 64).in_dll(stub, "stub_parameters")
next_result = ctypes.c_int.in_dll(stub, "stub_next_result")
wants_context = ctypes.c_int.in_dll(stub, "stub_wants_context")


def declared(ptx: str) -> list[int]:
    """Bytes of each parameter of a kernel, from its machine code's text."""
    entry = re.search(r"\.entry\s+\w+\((.*?)\)\s*\n", ptx, re.S).group(1)
    found = []
    for line in entry.split(","):
        array = re.search(r"\.b8\s+\w+\[(\d+)\]", line)
        found.append(int(array[1]) if array else int(re.search(r"\.[a-z](\d+)\s", line)[1]) // 8)
    return found


def with_dependence(work: Work) -> Work:
    """All launches but the first may begin before the one in front of them has ended."""
    return work._replace(launches=tuple(one._replace(dependent=n > 0) for n, one in enumerate(work.launches)))


def compile_offline(work: Work) -> list[object]:
    found = []
    for number, one in enumerate(work.launches, 1):
        kernel = one.function.warmup(
            *one.arguments, *one.constants, grid=one.grid, num_warps=one.warps, num_stages=one.stages,
            launch_pdl=one.dependent,
        )  # fmt: skip
        kernel.function = number
        found.append(kernel)
        declares = declared(kernel.asm["ptx"])
        counts[number] = len(declares)
        for index, size in enumerate(declares):
            sizes[number][index] = size
    return found


def pairs(kinds: object, values: object) -> list[tuple[str, object]]:
    if not isinstance(kinds, tuple):
        return [(kinds, values)]
    return list(itertools.chain.from_iterable(map(pairs, kinds, values)))


def check(work: Work, compiled: list[object], seen: list[torch.Tensor], results: list[torch.Tensor], at: int) -> None:
    """That the launches from `at` on had what triton's own launcher would have passed for `seen` and `results`."""
    assert [t.shape for t in results] == [t.shape for t in work.results]
    assert [t.stride() for t in results] == [t.stride() for t in work.results]
    assert [t.dtype for t in results] == [t.dtype for t in work.results]
    replaced = {id(old): new for old, new in zip(work.results, results, strict=True)}
    scratch = {id(tensor) for tensor in work.scratch}
    replaced |= {id(old): new for old, new in zip(work_inputs, seen, strict=True)}
    for step, (one, kernel) in enumerate(zip(work.launches, compiled, strict=True)):
        shape, bytes_of = shapes[at + step], parameters[at + step]
        assert list(shape) == [
            step + 1, one.grid[0], one.grid[1], 32 * kernel.metadata.num_warps, kernel.metadata.shared, 0,
            step > 0,
        ]  # fmt: skip
        position = 0

        def take(format: str, bytes_of: object = bytes_of) -> object:
            nonlocal position
            raw = bytes(bytes_of[position])[: struct.calcsize(format)]
            position += 1
            return struct.unpack(format, raw)[0]

        for kind, value in pairs(tuple(kernel.src.signature.values()), (*one.arguments, *one.constants)):
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                words = struct.unpack("<16Q", bytes(bytes_of[position]))
                position += 1
                base = id(value.base)
                assert words[0] % 16 == 0 if base in scratch else words[0] == replaced[base].data_ptr()
                rank = len(value.shape)
                assert list(words[8 : 8 + rank]) == list(value.shape)[::-1]
                assert list(words[12 : 11 + rank]) == [2 * s for s in value.strides[-2::-1]]
                assert [take("<i") for _ in range(rank)] == list(value.shape)
                assert [take("<q") for _ in range(rank)] == list(value.strides)
            elif kind.startswith("*"):
                found = take("<Q")
                assert found == replaced[id(value)].data_ptr() if id(value) not in scratch else found % 16 == 0
            elif kind == "fp32":
                assert take("<f") == struct.unpack("<f", struct.pack("<f", value))[0]
            else:
                assert take({"i32": "<i", "i64": "<q"}[kind]) == value, (kind, value)
        assert position == counts[step + 1] - 2


def run(tensors: list[torch.Tensor], place: int) -> list[torch.Tensor]:
    return torch.ops.heedful.launches_run(tensors, place)


def keep(work: Work, compiled: list[object], tensors: list[torch.Tensor], place: int = 0) -> int:
    code = kept._encode(work._replace(device=0), compiled, tensors, cuda=False)
    return torch.ops.heedful.launches_keep(torch.tensor(code), place)


def run_without_context(tensors: list[torch.Tensor], place: int) -> int:
    """How many results there are in a thread that has called nothing of CUDA's yet."""
    found: list[int] = []
    wants_context.value = 1
    thread = threading.Thread(target=lambda: found.append(len(run(tensors, place))))
    thread.start()
    thread.join()
    wants_context.value = 0
    return sum(found)


triton.runtime.driver.set_active(Offline(90))
launch.device_limits = gradients.device_limits = lambda index: (90, 132)
ENDS = torch.tensor([0, 60, 300], dtype=torch.int32)
work_inputs: list[torch.Tensor] = []
cases = {
    "full": (Full(), 300, 200, {}), "documents": (Documents(ENDS), 300, 300, {}), "decode": (Full(), 1, 4096, {}),
    "windowed-decode": (SlidingWindow(999, 0), 1, 4096, {}),
    "features": (SlidingWindow(99, 0), 300, 250, {
        "bias": torch.randn(1, 1, 300, 250).half(), "alibi_slopes": torch.rand(1, 2), "sinks": torch.randn(2),
        "softcap": 3.0, "dropout_p": 0.25, "seed": torch.tensor([-5]),
    }),
}  # fmt: skip
for name, (pattern, length, keys, features) in cases.items():
    q = torch.randn(1, 2, length, 128).half()
    k, v = (torch.randn(1, 1, keys, 128).half() for _ in range(2))
    operands = tuple(operand.detach() for operand in pattern.operands(length, keys))
    work = launch.forward_work(q, k, v, operands, pattern.schedule.encode(), 0.1, name == "full", **features)
    work = with_dependence(work)
    work_inputs = [q, k, v, *operands, *(value for value in features.values() if isinstance(value, torch.Tensor))]
    compiled = compile_offline(work)
    place = keep(work, compiled, work_inputs)
    assert place > 0, name
    for _ in range(2):
        others = [tensor.clone() for tensor in work_inputs]
        at = launches.value % 64
        results = run(others, place)
        assert len(results) == 2
        check(work, compiled, others, results, at)
        assert len(work.launches) == (2 if "decode" in name else 1)
    assert run_without_context(others, place) == 2
    # Anything else about the tensors is another form.
    count = launches.value
    strided = v.transpose(2, 3).contiguous().transpose(2, 3)
    for index, other in ((0, q[:, :, : length // 2]), (1, k.float()), (2, strided), (2, v[:, :, : keys - 100])):
        changed = list(others)
        changed[index] = other
        assert run(changed, place) == []
    unaligned = torch.empty(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    assert run([unaligned, *others[1:]], place) == []
    assert run(others[:-1], place) == []
    assert launches.value == count
    without = shortcuts.without_lse(work)
    elsewhere = keep(without, compiled, work_inputs)
    assert len(run(others, elsewhere)) == 1
    if len(work_inputs) == 3:
        assert torch.ops.heedful.launches_run_one(*others, elsewhere).shape == work.results[0].shape
        assert torch.ops.heedful.launches_run_one(others[0], others[1], others[1].float(), elsewhere) is None
    # A second form at the same place, and both are found.
    if not features:
        second = [q, k[:, :, : keys - 100], v[:, :, : keys - 100], *operands]
        again = launch.forward_work(*second[:3], operands, pattern.schedule.encode(), 0.1, False)
        both = compile_offline(again)
        assert keep(again, both, second, place) == place
        assert len(run(second, place)) == 2
        assert len(run(others, place)) == 2
    torch.ops.heedful.launches_forget(torch.tensor([place]))
    assert run(others, place) == []
    print(name)

# Keys that grow, in their buffers or made anew for each length: the same work but for what follows from their number.
q, (k, v) = torch.randn(2, 4, 1, 128).half(), (torch.randn(2, 2, 9000, 128).half() for _ in range(2))
for pattern, remade in itertools.product((Full(), SlidingWindow(999, 0)), (False, True)):
    code = pattern.schedule.encode()

    def of_length(length: int, its_values: int = 0, remade: bool = remade) -> list[torch.Tensor]:
        cut = k[:, :, :length], v[:, :, : its_values or length]
        return [q, *(tensor.contiguous() if remade else tensor for tensor in cut)]

    work_inputs = of_length(4000)
    work = with_dependence(launch.forward_work(*work_inputs, (), code, 0.1, False))
    low, high = work.lengths()
    assert low < 4000 < high
    compiled = compile_offline(work)
    place = keep(work, compiled, work_inputs)
    for length in (low, 3999, high):
        work_inputs = of_length(length)
        there = launch.forward_work(*work_inputs, (), code, 0.1, False)
        at = launches.value % 64
        check(there, compiled, work_inputs, run(work_inputs, place), at)
        assert run_without_context(work_inputs, place) == 2
    assert run(of_length(high + 1), place) == []
    assert run(of_length(low - 1), place) == []
    assert run(of_length(high, high - 1), place) == []
    assert run([q, k[:, :, :high], v[:, :, :high].contiguous()], place) == []
print("lengths")

for length in (250, 256):
    q, k, v, out, grad = (torch.randn(1, 2, length, 64).half() for _ in range(5))
    lse = torch.randn(1, 2, length)
    code = Causal().schedule.encode()
    work = gradients.backward_work(
        grad, q, k, v, out, lse, (), code, 0.1, None, None, 0.0, 0.0, None, None, None, False, False
    )
    work = with_dependence(work)
    work_inputs = [grad, q, k, v, out, lse]
    compiled = compile_offline(work)
    place = keep(work, compiled, work_inputs)
    at = launches.value % 64
    check(work, compiled, work_inputs, run(work_inputs, place), at)
print("backward")

next_result.value = 201
assert len(run(work_inputs, place)) == 6
next_result.value = 700
with pytest.raises(RuntimeError, match="CUDA error 700, as the test asked for"):
    run(work_inputs, place)
counts[1] += 1
assert keep(work, compiled, work_inputs) == -1
with pytest.raises(kept.NotKept, match="such as a copy"):
    kept._encode(work, compiled, [grad, q.clone(), k, v, out, lse], cuda=False)
print("refusals")

# The same from `Kept`, as though these tensors were a device's.
encode = kept._encode
kept._encode = lambda work, compiled, tensors, cuda: encode(work._replace(device=0), compiled, tensors, cuda=False)
kept._current_device = lambda: 0
compiles = 0


def make(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Work:
    global compiles
    compiles += 1
    return launch.forward_work(query, key, value, (), Full().schedule.encode(), 0.1, False)


Work.run = compile_offline
calls = kept.Kept(0)
q, k, v = torch.randn(1, 2, 300, 128).half(), torch.randn(1, 1, 200, 128).half(), torch.randn(1, 1, 200, 128).half()
for _ in range(5):
    out, lse = calls.run([q, k, v], make)
assert compiles == 1
calls.run([q, k, k], make)
assert compiles == 1, "tensors of the same form are told apart by their addresses alone"
keeps, keep_one = [], kept.Kept._keep
kept.Kept._keep = lambda self, *given: keeps.append(1) or keep_one(self, *given)
for length in range(100, 199):
    calls.run([q[:, :, :length], k, v], make)
assert len(keeps) < 15, "what never repeats is not kept each time"
for _ in range(100):
    calls.run([q[:, :, :100], k, v], make)
calls.run([q[:, :, :99], k, v], make)
assert len(keeps) < 20, "what repeats is kept again"
assert kept.Kept(-1).place == -1
single = kept.Kept(0, single=True)
for allowed in (False, True):
    torch.backends.cuda.matmul.allow_tf32 = allowed
    compiles = 0
    for _ in range(3):
        single.run([q, k, v], make)
    assert compiles == 1, "a change of precision is noticed, and then kept"
print("Kept")

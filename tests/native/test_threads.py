"""The engine among threads and processes: called from several at once, in workers, after a fork, without the GIL."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from comparison import check, run
from inputs import attention_inputs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import heedful
from heedful import Causal, Full, SlidingWindow


@pytest.fixture
def threads():
    """Sets the number of torch's threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", (1, 2))
def test_several_python_threads_at_once(count, threads):
    """Each call is right and gives the bits that it gives alone, forward and backward."""
    threads(count)
    calls = []
    for index, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64)):
        q, k, v = attention_inputs(
            heads=4, kv_heads=2, q_length=90 + index, k_length=200 + index, head_dim=24, dtype=dtype
        )
        options = ({"pattern": Full()}, {"pattern": Causal(), "softcap": 3.0}, {"pattern": SlidingWindow(30)})[
            index % 3
        ]
        upstream = {"out": torch.randn(2, 4, 90 + index, 24).to(dtype)}
        options = {**options, "sinks": torch.randn(4), "through": ("out",), "upstream": upstream}
        calls.append(((q, k, v), options, check(q, k, v, **options)))
    failures: list[str] = []
    begin = threading.Barrier(len(calls))

    def repeat(tensors, options, alone) -> None:
        begin.wait()
        for _ in range(10):
            found = run(*tensors, **options)
            same = torch.equal(found.out, alone.out) and torch.equal(found.lse, alone.lse)
            if not same or not all(torch.equal(g, alone.gradients[n]) for n, g in found.gradients.items()):
                failures.append(str(tensors[0].dtype))

    workers = [threading.Thread(target=repeat, args=call) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_more_python_threads_than_cores(threads):
    threads(2)
    q, k, v = attention_inputs(q_length=130, k_length=130)
    alone = run(q, k, v, causal=True)
    results: list[Tensor] = []
    workers = [threading.Thread(target=lambda: results.append(run(q, k, v, causal=True).out)) for _ in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 16
    assert all(torch.equal(result, alone.out) for result in results)


def test_caches_are_cleared_while_calls_run():
    q, k, v = attention_inputs(q_length=130, k_length=130)
    alone = run(q, k, v, causal=True, through=("out",))
    done = threading.Event()

    def clear() -> None:
        while not done.is_set():
            heedful.clear_caches()

    worker = threading.Thread(target=clear)
    worker.start()
    try:
        again = [run(q, k, v, causal=True, through=("out",), upstream=alone.upstream) for _ in range(30)]
    finally:
        done.set()
        worker.join()
    for found in again:
        assert torch.equal(found.out, alone.out)
        assert all(torch.equal(found.gradients[name], alone.gradients[name]) for name in "qkv")


def longest_pause_while(work) -> tuple[float, float]:
    """How long `work` takes in a thread, and the longest that this thread was kept from running meanwhile."""
    worker = threading.Thread(target=work)
    begin = last = time.perf_counter()
    longest = 0.0
    worker.start()
    while worker.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return last - begin, longest


@pytest.mark.parametrize("kind", ("forward", "backward", "weights", "sparse"))
def test_a_call_lets_other_python_threads_run(kind, threads):
    threads(1)
    q, k, v = attention_inputs(batch=1, heads=8, q_length=1500, k_length=1500, head_dim=64)
    if kind == "backward":
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = heedful.attention(*leaves, backend="native")
        arriving = torch.randn_like(out)

        def work() -> None:
            torch.autograd.grad(out, leaves, arriving, retain_graph=True)
    elif kind == "forward":

        def work() -> None:
            heedful.attention(q, k, v, backend="native")
    else:

        def work() -> None:
            heedful.attention(q, k, v, backend="native", return_weights=True if kind == "weights" else "sparse")

    # A call that kept the interpreter locked would stop this thread for most of its time; the least of three
    # attempts, since whatever else runs on the machine stops it too.
    attempts = (longest_pause_while(work) for _ in range(3))
    assert min(pause / whole for whole, pause in attempts) < 0.5


class Attended(Dataset):
    """Each item is attention over random numbers that its index decides, forward and backward."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(index)
        q, k, v = (torch.randn(1, 2, 70, 16, generator=generator).requires_grad_() for _ in range(3))
        out = heedful.attention(q, k, v, causal=True, backend="native")
        out.square().sum().backward()
        return torch.cat([out.detach(), q.grad, k.grad, v.grad])


@pytest.mark.parametrize("context", ("fork", "spawn"))
def test_in_workers_of_a_data_loader(context, threads):
    threads(2)
    data = Attended()
    here = [data[index] for index in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=context, timeout=60)
    for mine, theirs in itertools.zip_longest(loader, here):
        assert torch.equal(mine, theirs)


FORK = """
import os, signal, threading
import torch
import heedful
from heedful.backend.native import library

torch.set_num_threads(2)
q, k, v = (torch.randn(2, 4, 150, 32).requires_grad_() for _ in range(3))
arriving = torch.randn(2, 4, 150, 32)

def step():
    out = heedful.attention(q, k, v, causal=True, softcap=5.0, backend="native")
    gradients = torch.autograd.grad(out, (q, k, v), arriving)
    return b"".join(t.detach().numpy().tobytes() for t in (out, *gradients))

wanted = step()
running = threading.Event()

def keep_calling():
    for _ in range(200):
        step()
        running.set()

# The fork comes while another thread is inside the engine, and holds whatever it locks.
worker = threading.Thread(target=keep_calling)
worker.start()
running.wait()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        # Of autograd, a child forked from a process that has used it keeps only the forward.
        with torch.no_grad():
            out = heedful.attention(q, k, v, causal=True, softcap=5.0, backend="native")
        library.clear_caches()
        os._exit(0 if wanted.startswith(out.numpy().tobytes()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
worker.join()
assert step() == wanted
"""


def test_fork_while_another_thread_is_in_the_engine():
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=120)


OPERATOR_AFTER_FORK = """
import os, signal
import torch
from heedful.backend.native import library

library.load_operators()
torch.set_num_threads(2)
q = torch.randn(2, 4, 200, 32)
forward, backward = torch.ops.heedful.attention_forward, torch.ops.heedful.attention_backward

def step():
    out, lse = forward(q, q, q, [], [], 0.125, False)
    found = backward(
        q, q, q, q, out, lse, [], [], 0.125, None, None, 0.0, 0.0, None, None, None, False, False
    )
    return b"".join(t.numpy().tobytes() for t in (out, *found[:3]))

wanted = step()
torch.ones(1 << 22).exp().sum()
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(0 if step() == wanted else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert step() == wanted
"""


def test_backward_in_a_child_forked_after_the_pool_started():
    subprocess.run([sys.executable, "-W", "ignore", "-c", OPERATOR_AFTER_FORK], check=True, timeout=60)

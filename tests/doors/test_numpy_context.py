"""heedful.numpy's contexts, threads and processes, and that none of it needs torch."""

from __future__ import annotations

import gc
import inspect
import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest
from numpy_arrays import array

import heedful
import heedful.numpy
from heedful.numpy import Context, MFAContext, MFAError, attention, defaults, flash_attention_forward


@pytest.fixture
def qkv() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [array(rng, (61, 4, 16)) for _ in range(3)]


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
import numpy as np
import heedful, heedful.numpy as hn
from heedful.numpy import attention, Context
q = np.random.default_rng(0).standard_normal((2, 9, 4, 8)).astype(np.float32)
mask, stop = np.tril(np.ones((9, 9), bool)), np.array([9, 7])
cu = np.array([0, 4, 9])
same = attention(q, q, q, causal=True)
for other in (dict(attn_mask=mask), dict(pattern=mask), dict(pattern=heedful.Mask(mask)), dict(window=(None, 0)),
              dict(pattern=heedful.Causal(np.array([0]))), dict(pattern=heedful.Causal() & heedful.Padding(0, stop) |
              heedful.Causal())):
    np.testing.assert_allclose(attention(q, q, q, **other), same, atol=1e-6)
blocks = heedful.BlockSparse(np.ones((3, 3), bool), 4) & heedful.Causal()
np.testing.assert_allclose(attention(q, q, q, pattern=blocks), same, atol=1e-6)
for pattern in (heedful.Documents(cu, within=heedful.Causal()), heedful.BigBird(2, 1, 1, 1), heedful.Longformer(2, [3]),
                heedful.Global(np.array([1])), heedful.Dilated(2, 2), heedful.Chunked(4), heedful.Prefix(3)):
    assert np.isfinite(attention(q, q, q, pattern=pattern)).all()
    assert "array[" in repr(heedful.Padding(0, stop)) and pattern == pattern and hash(pattern)
try:
    attention(q, q, q, pattern=heedful.Documents(cu, within=heedful.Prefix(1) & heedful.Mask(mask[:1, :1])))
except ImportError as error:
    assert "needs torch where its `within` has documents, blocks or a mask" in str(error)
try:
    attention(q, q, q, causal=3.5)
except TypeError as error:
    assert "causal takes a bool" in str(error)
with Context(2) as context:
    np.testing.assert_array_equal(context.attention(q, q, q, causal=True), same)
from heedful.compat import umfa
np.testing.assert_array_equal(umfa.attention(q, q, q, causal=True), same)
heedful.set_num_threads(2)
assert heedful.numpy.get_num_threads() == 2
assert sys.modules["torch"] is None and not any(name.startswith("torch.") for name in sys.modules)
"""


def test_it_needs_no_torch():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_it_loads_no_torch():
    code = """
import sys, numpy as np, heedful.numpy as hn, heedful
q = np.ones((3, 8), np.float32)
hn.attention(q, q, q, pattern=heedful.SlidingWindow(1), attn_mask=np.ones((3, 3), bool))
assert "torch" not in sys.modules
import torch
assert torch.equal(heedful.Causal(torch.tensor([1])).dense(2, 2), torch.tensor([[[[True, True], [True, True]]]]))
hn.attention(q, q, q, pattern=heedful.Causal(torch.tensor([1])))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_numpy_stays_numpy():
    code = "import heedful, numpy; assert heedful.numpy.attention and numpy.__name__ == 'numpy' and numpy.ones(1)[0]"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert heedful.numpy.__name__ == "heedful.numpy"


def test_without_an_engine(tmp_path):
    code = """
import numpy as np, heedful
from heedful.compat import umfa
assert umfa.is_metal_available() in (True, False) and len(umfa.get_version()) == 3
q = np.ones((2, 8), np.float32)
umfa.attention(q, q, q)
"""
    environment = {**os.environ, "HEEDFUL_ENGINE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert f"ImportError: heedful's compiled engine is not there: no {tmp_path}" in result.stderr
    assert "umfa.attention(q, q, q)" in result.stderr or "line 6" in result.stderr


def test_addresses_where_objects_cannot_be_read(monkeypatch):
    from heedful.backend.native import structures

    x = np.ones((5, 3), np.float16)[1:, 1:]
    assert structures.address(x) == x.ctypes.data
    monkeypatch.setattr(structures, "_READABLE", False)
    assert structures.address(x) == x.ctypes.data


def test_a_context_is_used_again_and_closed_more_than_once(qkv):
    plain = attention(*qkv)
    with MFAContext() as context:
        assert isinstance(context, Context)
        assert context
        assert not context.closed
        for _ in range(3):
            np.testing.assert_array_equal(flash_attention_forward(context, *qkv), plain)
            np.testing.assert_array_equal(attention(*qkv, context=context), plain)
            np.testing.assert_array_equal(context.attention(*qkv), plain)
    for _ in range(3):
        assert not context
        assert context.closed
        assert repr(context) == "Context(closed)"
        for use in (
            lambda: flash_attention_forward(context, *qkv),
            lambda: attention(*qkv, context=context),
            context.__enter__,
            lambda: context.num_threads,
        ):
            with pytest.raises(MFAError, match=r"the context is closed \(status 1\)") as caught:
                use()
            assert caught.value.code == 1
        context.close()


def test_a_context_is_closed_by_an_error_inside():
    with pytest.raises(ZeroDivisionError), Context(2) as context:
        1 / 0  # noqa: B018
    assert context.closed


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads through /proc")
def test_threads_come_and_go(qkv):
    gc.collect()
    before = threads()
    with Context(4) as context:
        assert context.num_threads == 4
        assert repr(context) == "Context(num_threads=4)"
        assert threads() == before + 3
        context.attention(*qkv)
    assert threads() == before
    dropped = Context(3)
    dropped.attention(*qkv)
    del dropped
    gc.collect()
    assert threads() == before


def test_closing_gives_scratch_memory_back(qkv):
    from heedful.backend.native import library

    library.clear_caches()
    context = Context(1)
    context.attention(*qkv)
    context.close()
    assert library.clear_caches() == 0
    attention(*qkv)
    assert library.clear_caches() > 0


@pytest.mark.parametrize("wrong", [0, -1, 5000])
def test_counts_of_threads(wrong):
    for make in (Context, heedful.numpy.set_num_threads):
        with pytest.raises(ValueError, match=f"num_threads takes an int from 1 to 4096.* got {wrong}"):
            make(wrong)
        with pytest.raises(TypeError, match=r"num_threads takes an int.* got 'all'"):
            make("all")


def test_num_threads_of_calls_without_a_context(qkv, monkeypatch):
    monkeypatch.setattr(defaults, "_default", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert heedful.numpy.get_num_threads() == 3
    monkeypatch.setattr(defaults, "_default", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    assert heedful.numpy.get_num_threads() == len(os.sched_getaffinity(0))
    assert Context().num_threads == len(os.sched_getaffinity(0))
    plain = attention(*qkv)
    for count in (1, 5):
        heedful.set_num_threads(count)
        assert heedful.numpy.get_num_threads() == count
        np.testing.assert_array_equal(attention(*qkv), plain)
    with pytest.raises(TypeError, match="num_threads takes an int, got None"):
        heedful.set_num_threads(None)


def test_threads_share_a_context():
    rng = np.random.default_rng(1)
    sizes = [(61, 4, 16), (2, 33, 2, 8), (300, 24)]
    inputs = [[array(rng, shape) for _ in range(3)] for shape in sizes]
    wrong: list[object] = []
    with Context(2) as context:
        expected = [context.attention(*x, causal=True) for x in inputs]

        def work(first: int) -> None:
            try:
                for i in range(60):
                    which = (first + i) % len(inputs)
                    found = context.attention(*inputs[which], causal=True)
                    if not np.array_equal(found, expected[which]) or not context.last_call.zero_copy:
                        wrong.append(which)
                    if first == 0:
                        context.attention(*inputs[which], causal=True, input_precision="fp16")
                        if context.last_call.zero_copy:
                            wrong.append("last_call is another thread's")
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert wrong == []


def test_last_call_is_of_this_thread_and_context(qkv):
    with Context(1) as one, Context(1) as other:
        assert one.last_call is None
        one.attention(*qkv)
        assert one.last_call.zero_copy
        assert other.last_call is None
        found: list[object] = []
        worker = threading.Thread(target=lambda: found.append(one.last_call))
        worker.start()
        worker.join()
        assert found == [None]


def test_closing_waits_for_nobody_and_breaks_nobody():
    q = array(np.random.default_rng(2), (600, 2, 32))
    plain = attention(q, q, q)
    outcomes: list[object] = []
    for _ in range(5):
        context = Context(3)

        def work(context: Context = context) -> None:
            try:
                while True:
                    outcomes.append(np.array_equal(context.attention(q, q, q), plain))
            except MFAError as error:
                outcomes.append(f"status {error.code}")

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.02)
        context.close()
        for worker in workers:
            worker.join()
    assert set(outcomes) <= {True, "status 1"}
    assert outcomes.count("status 1") == 10


def child(body: object) -> int:
    """Runs body in a forked process; its exit status, or the signal's number negated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        import signal

        signal.alarm(30)
        try:
            body()  # type: ignore[operator]
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_forked_children():
    q = array(np.random.default_rng(3), (2, 150, 4, 16))
    context = Context(3)
    expected = context.attention(q, q, q, causal=True)
    attention(q, q, q)
    stop = threading.Event()

    def busy() -> None:
        while not stop.is_set():
            context.attention(q, q, q)

    def body() -> None:
        assert context.num_threads == 1
        for _ in range(3):
            np.testing.assert_array_equal(context.attention(q, q, q, causal=True), expected)
            np.testing.assert_array_equal(attention(q, q, q, causal=True), expected)
        context.close()
        with Context(3) as own:
            assert own.num_threads == 3
            np.testing.assert_array_equal(own.attention(q, q, q, causal=True), expected)
        heedful.set_num_threads(2)
        np.testing.assert_array_equal(attention(q, q, q, causal=True), expected)

    worker = threading.Thread(target=busy)
    worker.start()
    try:
        assert [child(body) for _ in range(3)] == [0, 0, 0]
    finally:
        stop.set()
        worker.join()
    np.testing.assert_array_equal(context.attention(q, q, q, causal=True), expected)


def test_kinds_of_calls_that_are_remembered_are_bounded(monkeypatch):
    from heedful.numpy import context as module

    monkeypatch.setattr(module, "_MAX_PREPARED", 8)
    with Context(1) as context:
        for length in range(1, 40):
            q, k = np.ones((1, 2, 8), np.float32), np.ones((length, 2, 8), np.float32)
            np.testing.assert_allclose(context.attention(q, k, k), q)
            assert len(context._prepared) <= 8


def test_the_call_of_the_documents():
    names = list(inspect.signature(flash_attention_forward).parameters)
    assert names[:4] == ["context", "q", "k", "v"]
    assert names[4:10] == [
        "attn_mask", "causal", "softmax_scale", "input_precision", "intermediate_precision", "output_precision",
    ]  # fmt: skip
    with pytest.raises(TypeError, match=r"context takes a heedful.numpy.Context, got a ndarray"):
        flash_attention_forward(np.ones(3), np.ones(3), np.ones(3), np.ones(3))


def test_version():
    assert heedful.numpy.get_version() == tuple(int(part) for part in heedful.__version__.split("."))


def test_metal_is_on_macs(monkeypatch):
    assert heedful.numpy.is_metal_available() == (sys.platform == "darwin")
    monkeypatch.setattr(sys, "platform", "darwin")

    class Create:
        device: int | None = 0x1234

        def __call__(self) -> int | None:
            return self.device

    class Framework:
        MTLCreateSystemDefaultDevice = Create()

        def __init__(self, path: str) -> None:
            assert path.endswith("Metal.framework/Metal")

    monkeypatch.setattr(defaults.ctypes, "CDLL", Framework)
    assert heedful.numpy.is_metal_available()
    Create.device = None
    assert not heedful.numpy.is_metal_available()

    def absent(path: str) -> None:
        raise OSError(path)

    monkeypatch.setattr(defaults.ctypes, "CDLL", absent)
    assert not heedful.numpy.is_metal_available()


def test_errors_keep_their_code():
    import pickle

    error = pickle.loads(pickle.dumps(MFAError(3, "out of memory")))
    assert (error.code, error.message, str(error)) == (3, "out of memory", "out of memory (status 3)")
    assert isinstance(error, RuntimeError)

"""Attention on numpy arrays, without torch.

python examples/numpy_attention.py
"""

import sys
import time

import numpy as np

import heedful
from heedful.numpy import Context, attention, last_call


def naive(q, k, v, allowed):
    """Attention of (S, H, D) arrays the way one writes it in numpy: every score of every pair, in memory at once."""
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    scores = q @ k.swapaxes(1, 2) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.where(allowed, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(0, 1)


def milliseconds(call):
    call()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


rng = np.random.default_rng(0)
q, k, v = (rng.standard_normal((1024, 8, 64), np.float32) for _ in range(3))
behind = np.arange(1024)[:, None] - np.arange(1024)

print("causal, 1024 positions, 8 heads of 64:")
same = naive(q, k, v, behind >= 0)
np.testing.assert_allclose(attention(q, k, v, causal=True), same, atol=2e-5)
print(f"  the same as plain numpy; plain {milliseconds(lambda: naive(q, k, v, behind >= 0)):.1f} ms,", end=" ")
print(f"heedful {milliseconds(lambda: attention(q, k, v, causal=True)):.1f} ms")

print("a window of 128 keys and 4 positions that everything sees:")
pattern = heedful.SlidingWindow(127, 0) | heedful.Global(4)
allowed = ((behind >= 0) & (behind < 128)) | (np.arange(1024) < 4) | (np.arange(1024) < 4)[:, None]
np.testing.assert_allclose(attention(q, k, v, pattern=pattern), naive(q, k, v, allowed), atol=2e-5)
print(f"  the same as plain numpy; heedful {milliseconds(lambda: attention(q, k, v, pattern=pattern)):.1f} ms")

print("memory:")
turned = np.ascontiguousarray(q.swapaxes(0, 1)).swapaxes(0, 1)
out = np.empty_like(q)
assert attention(turned, k[::-1], v[::-1], out=out) is out
print(f"  heads first, keys backwards, into an array of one's own: copied {', '.join(last_call().copied) or 'nothing'}")
assert last_call().zero_copy
half = attention(q, k, v, input_precision="fp16")
print(f"  rounded to {half.dtype} at the door: copied {', '.join(last_call().copied)}; q {last_call().copied['q']}")
assert half.dtype == np.float16
np.testing.assert_allclose(half, attention(q, k, v), atol=2e-3)

print("a context of one's own, with two threads:")
with Context(num_threads=2) as context:
    found = context.attention(q, k, v, causal=True, return_lse=True)
    np.testing.assert_array_equal(found.out, attention(q, k, v, causal=True))
    print(f"  {context}; log-sum-exp {found.lse.shape}; the same bits as with any number of threads")

assert "torch" not in sys.modules
print("and torch was never loaded")

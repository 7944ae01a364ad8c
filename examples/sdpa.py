"""heedful.scaled_dot_product_attention in the place of PyTorch's: the one changed line is the import.

python examples/sdpa.py
"""

from time import perf_counter

import torch
import torch.nn.functional as F

# from torch.nn.functional import scaled_dot_product_attention
from heedful import scaled_dot_product_attention


def milliseconds(function, *arguments):
    function(*arguments)
    times = []
    for _ in range(5):
        begin = perf_counter()
        function(*arguments)
        times.append(perf_counter() - begin)
    return 1e3 * min(times)


def main():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    length = 1024
    q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
    document = torch.arange(length) // 200
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    masks = {
        "no mask": None,
        "a causal mask": causal,
        "a window of 128 keys": causal.triu(-127),
        "the same as a float mask": torch.zeros(length, length).masked_fill(~causal.triu(-127), -torch.inf),
        "documents of 200 tokens": document[:, None] == document,
        "half of the pairs at random": torch.rand(length, length) < 0.5,
        "a position bias": torch.randn(8, length, length) / 4,
    }
    print(f"{'':28}{'PyTorch':>10}{'heedful':>10}")
    for name, mask in masks.items():
        wanted = F.scaled_dot_product_attention(q, k, v, mask)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), wanted)
        theirs, ours = (
            milliseconds(f, q, k, v, mask) for f in (F.scaled_dot_product_attention, scaled_dot_product_attention)
        )
        print(f"{name:28}{theirs:7.1f} ms{ours:7.1f} ms")

    # Gradients, the mask's too, and whatever else the function takes.
    q, k, v = (t[0, :, :100].double().requires_grad_() for t in (q, k, v))
    bias = torch.randn(8, 100, 100, dtype=torch.float64, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(f(q, k, v, bias, scale=0.1).square().sum(), (q, k, v, bias))
        for f in (scaled_dot_product_attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, wanted)
    print("gradients of queries, keys, values and mask agree")

    # What PyTorch refuses is refused with PyTorch's own words.
    try:
        scaled_dot_product_attention(q, k, v, bias, is_causal=True)
    except RuntimeError as error:
        print(f"refused: {str(error).splitlines()[0]}")
    else:
        raise AssertionError("a mask and is_causal together were not refused")


if __name__ == "__main__":
    main()

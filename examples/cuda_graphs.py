"""A model as CUDA graphs: one launch for all kernels of a call. Needs a GPU, and says so where there is none.

python examples/cuda_graphs.py
"""

import torch
from torch import nn

import heedful
from heedful import UnsupportedError
from heedful.graphs import Buckets, CaptureError, capture, compare


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(256), nn.Linear(256, 768), nn.Linear(256, 256)

    def forward(self, x):
        q, k, v = self.inner(self.norm(x)).unflatten(-1, (3, 4, 64)).unbind(-3)
        return x + self.out(heedful.attention(q, k, v, causal=True, layout="blhd").flatten(-2))


def main():
    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(8)]).eval()
    x = torch.randn(1, 50, 256)
    if torch.cuda.is_available():
        model, x = model.cuda().bfloat16(), x.cuda().bfloat16()

    try:
        # A causal model does not mind what is behind its input: lengths up to 64 share a graph, those up to 128 too.
        fast = capture(model, x, buckets=Buckets([64, 128], dim=1, pad={0: 0.0}, output_dim=1))
    except UnsupportedError as error:
        print(f"this example needs a GPU: {error.reasons['cuda'][0]}")
        return

    with torch.no_grad():
        for length in (50, 64, 100, 128):
            x = torch.randn(1, length, 256, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
        print(f"{len(fast)} graphs for 4 lengths, with the model's results")

        model[0].out.weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
        print("weights written in place hold for the next call")

        cost = compare(fast, x)
        print(f"{1e6 * cost.eager_seconds:.0f} µs a call, {1e6 * cost.graph_seconds:.0f} µs as a graph")

    try:
        capture(lambda x: x * 2 if x.sum() > 0 else x, x)
    except CaptureError as error:
        print(error)


if __name__ == "__main__":
    main()

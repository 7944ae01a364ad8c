"""A model that was written for flash-attn, on a CPU: its imports, training on packed sequences, decoding from pages.

python examples/flash_attn_model.py
"""

import importlib.util

import torch
from torch import nn

import heedful.flash_attn

torch.manual_seed(0)

if importlib.util.find_spec("flash_attn") is None:
    heedful.flash_attn.install()

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache  # noqa: E402
from flash_attn.bert_padding import pad_input, unpad_input  # noqa: E402

WIDTH, HEADS, KV_HEADS = 64, 4, 2
DIM = WIDTH // HEADS


class Attention(nn.Module):
    """Causal attention over whole, packed and cached sequences."""

    def __init__(self):
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * KV_HEADS * DIM)

    def heads(self, x):
        k, v = self.kv(x).unflatten(-1, (2, KV_HEADS, DIM)).unbind(-3)
        return self.q(x).unflatten(-1, (HEADS, DIM)), k, v

    def forward(self, x):
        return flash_attn_func(*self.heads(x), causal=True).flatten(-2)

    def packed(self, tokens, cu_seqlens, longest):
        ends = cu_seqlens, cu_seqlens, longest, longest
        return flash_attn_varlen_func(*self.heads(tokens), *ends, causal=True).flatten(-2)

    def decode(self, x, caches, lengths, table):
        q, k, v = self.heads(x)
        options = {"cache_seqlens": lengths, "block_table": table, "causal": True}
        return flash_attn_with_kvcache(q, *caches, k, v, **options).flatten(-2)


print("flash_attn is", importlib.util.find_spec("flash_attn").origin)
model = Attention()
lengths = torch.tensor([37, 5, 90])
x = torch.randn(3, 90, WIDTH)
mask = torch.arange(90) < lengths[:, None]

tokens, indices, cu_seqlens, longest, _ = unpad_input(x, mask)
out = model.packed(tokens, cu_seqlens, longest)
loss = out.square().mean()
loss.backward()
print(f"packed: {len(tokens)} tokens of {mask.numel()} places, loss {loss:.4f}, and its gradients")
padded = pad_input(out, indices, 3, 90)
for item, length in enumerate(lengths):
    torch.testing.assert_close(padded[item, :length], model(x[item : item + 1, :length])[0], atol=1e-5, rtol=1e-5)
assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
print("  each sequence as it is alone")

# A pool of blocks of 16 keys, of which each sequence has those that its row of the table names.
caches = [torch.zeros(20, 16, KV_HEADS, DIM) for _ in range(2)]
table = torch.randperm(20)[:18].view(3, 6).int()
filled = torch.zeros(3, dtype=torch.int32)
steps = []
with torch.no_grad():
    for begin, end in [(0, 80), *((n, n + 1) for n in range(80, 90))]:
        steps.append(model.decode(x[:, begin:end], caches, filled, table))
        filled += end - begin
    torch.testing.assert_close(torch.cat(steps, 1), model(x), atol=1e-5, rtol=1e-5)
print(f"decoded: {len(steps)} steps from blocks of 16, the same as all at once")

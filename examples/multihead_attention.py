"""torch.nn.MultiheadAttention and heedful.nn.MultiheadAttention with the same weights, then with a window.

python examples/multihead_attention.py
"""

from __future__ import annotations

import torch
from torch import nn

import heedful
from heedful.measure.timing import interleave

LENGTH, EMBED, HEADS, WINDOW = 1024, 128, 4, 32

torch.manual_seed(0)
theirs = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
ours = heedful.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
ours.load_state_dict(theirs.state_dict())

x = torch.randn(2, LENGTH, EMBED)
padding = torch.arange(LENGTH) >= torch.tensor([[700], [LENGTH]])  # True: this key is padding

out, weights = theirs(x, x, x, key_padding_mask=padding)
found, found_weights = ours(x, x, x, key_padding_mask=padding)
torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
torch.testing.assert_close(found_weights, weights, rtol=1e-4, atol=1e-5)
print("same weights, same call: same output and attention weights")

# A mask in torch, whose True excludes; a pattern in heedful, which never looks at what it leaves out.
distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
mask = distance > WINDOW
ours.pattern = heedful.SlidingWindow(WINDOW)
theirs.eval(), ours.eval()
with torch.no_grad():
    out, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    found, _ = ours(x, x, x, need_weights=False)
    torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
    times = interleave(
        lambda: theirs(x, x, x, attn_mask=mask, need_weights=False),
        lambda: ours(x, x, x, need_weights=False),
        seconds=2,
    )
print(
    f"a window of {WINDOW} keys on each side among {LENGTH}: same output; {times.baseline_seconds * 1e3:.1f} ms with "
    f"torch's mask, {times.candidate_seconds * 1e3:.1f} ms with heedful's pattern"
)

# The pattern of one call, beside the module's own: two documents packed into one sequence.
packed, cu = x.flatten(0, 1), torch.tensor([0, LENGTH, 2 * LENGTH])
with torch.no_grad():
    together, _ = ours(packed, packed, packed, need_weights=False, pattern=heedful.Documents(cu))
torch.testing.assert_close(together.view_as(found), found, rtol=1e-4, atol=1e-5)
print("two documents packed into one sequence: the same as a batch of two")

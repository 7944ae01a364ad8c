"""A torch.nn.TransformerEncoder that gets heedful's attention in place, trains on, and gets its own back.

python examples/convert.py
"""

from __future__ import annotations

import copy

import torch
from rich import print
from torch import nn

import heedful

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
model = nn.Sequential(nn.Linear(10, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 1))
original = copy.deepcopy(model)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
x, target = torch.randn(4, 50, 10), torch.randn(4, 50, 1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(5):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# One line. The optimizer, made before, holds the same parameters.
model, report = heedful.convert(model)
print(report)
losses = train(model, optimizer)
expected = train(original, torch.optim.Adam(original.parameters(), lr=1e-3))
assert all(abs(a - b) < 1e-4 for a, b in zip(losses, expected, strict=True))
print(f"the same losses as without: {[round(loss, 4) for loss in losses]}")

model.eval(), original.eval()
with torch.no_grad():
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)

# Patterns by the modules' names; the first glob that matches counts.
_, windowed = heedful.convert(model, pattern={"1.layers.0.*": heedful.SlidingWindow(8), "*": heedful.Causal()})
print(windowed)
with torch.no_grad():
    before = model(x)
    changed = x.clone()
    changed[:, -1] += 1
    assert torch.equal(model(changed)[:, :40], before[:, :40]), "nothing sees what is far ahead"

windowed.undo()
report.undo()
assert type(model[1].layers[0].self_attn) is nn.MultiheadAttention
with torch.no_grad():
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-4)
print("undone: torch's own modules again")

"""A small decoder at every level of the ladder: the same weights, the same text, other speeds.

python examples/levels.py
"""

from __future__ import annotations

import torch

from heedful import levels

torch.manual_seed(0)
decoder = levels.create("decoder", level=1, dim=128, heads=4, layers=2)

# What this machine runs. Level 3 compiles for seconds, so that it is left to `heedful levels`.
rungs = {1: decoder}
for level in levels.LEVELS:
    status = levels.available(level, "decoder")
    print(status)
    if status and level not in (1, 3):
        rungs[level] = levels.convert(decoder, level)

# One training step at the native level moves the weights of all, because they are the same.
text = torch.tensor([list(b"the quick brown fox jumps over the lazy dog")])
optimizer = torch.optim.Adam(rungs[5].parameters(), lr=3e-3)
for _ in range(40):
    logits = rungs[5](text[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

written = {level: bytes(rung.generate(text[:, :4], 39)[0].tolist()) for level, rung in rungs.items()}
for level, line in written.items():
    print(f"level {level} writes: {line.decode(errors='replace')}")
    assert line == written[1]

# Checked first, then timed; a table of time, memory and what ran.
block = levels.create("transformer_block", level=1, dim=128, heads=4)
modules = {f"{level} {levels.LEVELS[level]}": levels.convert(block, level) for level in rungs}
comparison = levels.compare_optimization_levels(modules, (1, 256, 128), seconds=0.3)
assert comparison.equivalent
print(comparison)

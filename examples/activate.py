"""heedful behind code that knows nothing of it: a model of torch.nn, trained and evaluated.

    python examples/activate.py

A whole script runs so without any change: `heedful run script.py`.
"""

import torch
from torch import nn

import heedful
from heedful.sdpa.record import recording


def train(steps, active):
    """Losses of a small language model that learns to repeat what it read 50 tokens ago."""
    torch.manual_seed(0)
    length, delay = 200, 50
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(16, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 16))
    embed, encoder, read = model
    position = nn.Parameter(torch.randn(length, 64) / 8)
    optimizer = torch.optim.AdamW([*model.parameters(), position], 3e-3)
    mask = nn.Transformer.generate_square_subsequent_mask(length)
    losses = []
    if active:
        heedful.activate()
    try:
        for _ in range(steps):
            tokens = torch.randint(16, (4, length))
            logits = read(encoder(embed(tokens) + position, mask=mask, is_causal=True))
            loss = nn.functional.cross_entropy(logits[:, delay:].flatten(0, 1), tokens[:, :-delay].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        if active:
            heedful.deactivate()
    return losses


def main():
    torch.set_num_threads(1)
    plain = train(10, active=False)
    with recording() as calls:
        active = train(10, active=True)
        rows = calls.rows()
    for step in (0, 4, 9):
        print(f"step {step}: loss {plain[step]:.4f} with PyTorch, {active[step]:.4f} with heedful")
    torch.testing.assert_close(torch.tensor(active), torch.tensor(plain), rtol=1e-3, atol=1e-3)
    for row in rows:
        print(f"{row['calls']} calls {'backward' if row['backward'] else 'forward'}: {row['what']}")
    assert all(row["taken"] for row in rows)
    assert sum(row["calls"] for row in rows) == 40

    # A padded batch takes the fast path of nn.TransformerEncoder in evaluation, heedful behind it.
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(4, 300, 64)
    padding = torch.arange(300) >= torch.tensor([300, 120, 40, 7])[:, None]
    with torch.no_grad():
        wanted = encoder(x, src_key_padding_mask=padding)
        with heedful.activate():
            found = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    print("a padded batch: the same through the fast path")


if __name__ == "__main__":
    main()

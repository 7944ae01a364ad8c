"""A Longformer that costs what its pattern says: `heedful.hf.patch` and back. Random weights, nothing is downloaded.

python examples/longformer.py
"""

from __future__ import annotations

import time

import torch
from transformers import LongformerConfig, LongformerForSequenceClassification

import heedful.hf

LENGTH = 2048

config = LongformerConfig(
    attention_window=[128] * 2,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_hidden_layers=2,
    max_position_embeddings=LENGTH + 2,
    vocab_size=1000,
    type_vocab_size=1,
    initializer_range=0.1,
)


@torch.no_grad()
def classify(model: LongformerForSequenceClassification, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The logits, and how long the second of two passes took. The model makes the first token global."""
    model(ids)
    start = time.perf_counter()
    logits = model(ids).logits
    return logits, time.perf_counter() - start


def main() -> None:
    torch.manual_seed(0)
    model = LongformerForSequenceClassification(config).eval()
    ids = torch.randint(3, 1000, (1, LENGTH))
    expected, own_seconds = classify(model, ids)

    report = heedful.hf.patch(model)
    print(report)
    actual, seconds = classify(model, ids)
    print(f"{LENGTH} tokens: {own_seconds * 1e3:.0f} ms before, {seconds * 1e3:.0f} ms now")
    print(f"logits {[round(x, 4) for x in actual[0].tolist()]}, before {[round(x, 4) for x in expected[0].tolist()]}")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)

    # Lengths that the window does not divide are not padded any more.
    classify(model, ids[:, :1000])

    report.undo()
    assert torch.equal(classify(model, ids)[0], expected)
    print("taken back")


if __name__ == "__main__":
    main()

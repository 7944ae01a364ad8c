"""A transformers model on heedful: one argument, the same answers.

    python examples/hugging_face.py

Any model of transformers' attention interface will do; this one has random weights, so that nothing is downloaded.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, MistralConfig

import heedful.hf  # registers attn_implementation="heedful"

config = MistralConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    sliding_window=64,
    initializer_range=0.2,
    pad_token_id=0,
    eos_token_id=None,
)


def main() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(1, 1000, (2, 300))
    padding = torch.ones_like(ids)
    padding[0, :100] = 0
    inputs = {"input_ids": ids * padding, "attention_mask": padding}
    real = padding.bool()
    with torch.no_grad():
        expected = model(**inputs).logits[real]
    wanted = model.generate(**inputs, max_new_tokens=12, do_sample=False)

    # For a model that is there already; from_pretrained(..., attn_implementation="heedful") is the same.
    model.set_attn_implementation("heedful")
    with torch.no_grad():
        actual = model(**inputs).logits[real]
    print(f"logits differ by {(actual - expected).abs().max():.1e} at most, of {expected.std():.1f} in size")
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=0)

    # HeedfulCache is written in place, where the default cache copies everything at each token.
    cache = heedful.hf.HeedfulCache(config=config)
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, past_key_values=cache)
    print("generated", generated[1, -12:].tolist())
    assert torch.equal(generated, wanted)

    loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~real, -100)).loss
    loss.backward()
    print(f"loss {loss:.3f}, gradient of the embedding {model.get_input_embeddings().weight.grad.norm():.3f}")


if __name__ == "__main__":
    main()

"""What `heedful.hf.patch` does to Longformer: the patched model beside transformers' own, turn by turn, at several
lengths and windows, with the share of all pairs that the pattern holds. Its first token is global.

    python benchmarks/longformer.py --threads 2

The sizes are longformer-base's but for the number of layers, the weights are random. "Self-attention" is one layer's
module, with its six projections, "attention" what is left of it without them, which patched is a call of
heedful.attention and follows the density; "model" is the whole forward pass.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from typing import Any

import torch
from torch import Tensor
from transformers import LongformerConfig, LongformerModel

import heedful
import heedful.hf
from heedful.hf.patches.long_documents import Layout
from heedful.measure.machine import environment
from heedful.measure.timing import Comparison, interleave, pinned_threads, take_turns

# (length, window of both sides together)
CASES = ((512, 512), (1024, 512), (2048, 512), (4096, 512), (4096, 256), (4096, 128), (4096, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the rounds of a case")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    machine = environment()
    with pinned_threads(options.threads):
        print(f"{machine['date']}, {machine['cpu']}, torch {torch.__version__}, {options.threads} thread(s),")
        print(f"{options.dtype}, batch 1, {options.layers} layers of longformer-base\n")
        own = "own, ms | ratio"
        print(f"| length | window | density | attention, ms | self-attention, ms | {own} | model, ms | {own} |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for length, window in CASES:
            print(row(length, window, options), flush=True)


@torch.no_grad()
def row(length: int, window: int, options: Any) -> str:
    torch.manual_seed(0)
    config = LongformerConfig(
        attention_window=[window] * options.layers,
        num_hidden_layers=options.layers,
        max_position_embeddings=4098,
        vocab_size=1000,
        type_vocab_size=1,
    )
    own = LongformerModel(config, add_pooling_layer=False).to(getattr(torch, options.dtype)).eval()
    ours = copy.deepcopy(own)
    heedful.hf.patch(ours)
    ids = torch.randint(3, 1000, (1, length))
    is_global = torch.zeros(1, length, dtype=torch.long)
    is_global[0, 0] = 1

    def forward(model: LongformerModel) -> Tensor:
        return model(ids, global_attention_mask=is_global).last_hidden_state

    layout_of = torch.zeros(1, length, dtype=torch.bool), is_global.bool()
    arguments = {
        "hidden_states": torch.randn(1, length, config.hidden_size, dtype=own.dtype),
        "attention_mask": is_global.to(own.dtype),
        "is_index_masked": layout_of[0],
        "is_index_global_attn": layout_of[1],
        "is_global_attn": True,
    }

    def attend(model: LongformerModel) -> Tensor:
        return model.encoder.layer[0].attention.self(**arguments)[0]

    tolerance = 1e-4 if options.dtype == "float32" else 0.1
    for call in (attend, forward):
        torch.testing.assert_close(call(ours), call(own), atol=tolerance, rtol=0)
    pattern = Layout.of(*layout_of).window(window // 2)
    states = torch.randn(3, 1, length, config.num_attention_heads, 64, dtype=own.dtype).unbind()
    alone = take_turns([lambda: heedful.attention(*states, pattern=pattern, layout="blhd")], seconds=1)
    timed = [interleave(lambda: call(own), lambda: call(ours), seconds=options.seconds) for call in (attend, forward)]  # noqa: B023
    start = f"| {length} | {window} | {pattern.density(length, length):.1%} | {statistics.median(alone[0]) * 1e3:.1f}"
    return f"{start} | {' | '.join(map(cells, timed))} |"


def cells(seen: Comparison) -> str:
    times = f"{seen.candidate_seconds * 1e3:.1f} | {seen.baseline_seconds * 1e3:.1f}"
    return f"{times} | {seen.ratio:.2f} ({seen.ratio_low:.2f}–{seen.ratio_high:.2f})"


if __name__ == "__main__":
    main()

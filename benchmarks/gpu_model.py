"""Hugging Face models with heedful and with their own attention on a CUDA device: prompts, and tokens after them.

    PYTHONPATH=src python benchmarks/gpu_model.py [--only TEXT] [--markdown]

Eight layers of the shape of a 7B model (four for the mixture of experts), random weights, bfloat16, batch 1. A prompt's
time is the median of three of one length, so without what a length costs that was not seen before; a token's time has
that in it, since keys grow by one each time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import heedful.hf

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "num_hidden_layers": 8, "vocab_size": 32000, "max_position_embeddings": 65536,
}  # fmt: skip
EXPERTS = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 64, "num_hidden_layers": 4, "num_local_experts": 4, "sliding_window": 128, "vocab_size": 32000,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...]]] = {
    "Llama": ("Llama", SHAPE, "sdpa", (4096, 16384, 32768)),
    "Mistral, window 4096": ("Mistral", SHAPE | {"sliding_window": 4096}, "sdpa", (4096, 16384, 32768)),
    "gpt-oss, sinks, window 128": ("GptOss", EXPERTS, "eager", (4096, 8192)),
}
TOKENS = 20


def made(name: str, options: dict[str, Any]) -> Any:
    config = getattr(transformers, f"{name}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    with torch.device("cuda"):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


@torch.no_grad()
def measured(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Seconds of a prompt and of a token after it, peak memory in bytes, and the last logits of the prompt."""
    torch.cuda.reset_peak_memory_stats()
    logits = model(ids, use_cache=False, logits_to_keep=1).logits
    prompt = statistics.median(
        seconds(lambda: model(ids, use_cache=False, logits_to_keep=1)) for _ in range(3)
    )  # fmt: skip
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    token = ids[:, -1:]

    def steps() -> None:
        for _ in range(TOKENS):
            model(token, past_key_values=cache, use_cache=True)

    steps()
    each = min(seconds(steps) for _ in range(3)) / TOKENS
    return {"prompt": prompt, "token": each, "memory": torch.cuda.max_memory_allocated(), "logits": logits.float()}


def line(name: str, length: int, theirs: str, found: dict[str, dict[str, Any]]) -> list[str]:
    cells = [name, f"{length:,}", theirs]
    for what, scale, unit in (("prompt", 1e3, "ms"), ("token", 1e3, "ms"), ("memory", 2**-30, "GiB")):
        its, ours = (found[side][what] if side in found else None for side in (theirs, "heedful"))
        text = f"{ours * scale:.3g} {unit}"
        cells.append(text if its is None else f"{text}, {its * scale:.3g} ({its / ours:.2f}×)")
    if theirs in found:
        cosine = torch.nn.functional.cosine_similarity(found[theirs]["logits"], found["heedful"]["logits"], dim=-1)
        cells.append(f"{float(cosine.min()):.4f}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="models whose names contain this")
    parser.add_argument("--markdown", action="store_true", help="a table for a page")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_model.py needs a CUDA device, and torch sees none")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, heedful "
        f"{heedful.__version__}\n"
    )
    if arguments.markdown:
        print("| model | prompt | beside | prompt's time | a token's time | peak memory | cosine of logits |")
        print("|---|---:|---|---:|---:|---:|---:|", flush=True)
    for name, (family, options, theirs, lengths) in MODELS.items():
        if arguments.only is not None and arguments.only not in name:
            continue
        model = made(family, options | {"attn_implementation": theirs})
        for length in lengths:
            ids = torch.randint(0, 32000, (1, length), device="cuda")
            found = {}
            for side in (theirs, "heedful"):
                model.set_attn_implementation(side)
                try:
                    found[side] = measured(model, ids)
                except torch.OutOfMemoryError:
                    if side == "heedful":
                        raise
                gc.collect()
                torch.cuda.empty_cache()
            cells = line(name, length, theirs, found)
            print(f"| {' | '.join(cells)} |" if arguments.markdown else "  ".join(cells), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

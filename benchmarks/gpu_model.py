"""Hugging Face models with heedful and with their own attention on a CUDA device: prompts, and tokens after them.

    PYTHONPATH=src python benchmarks/gpu_model.py [--only TEXT] [--markdown]

Eight layers of the shape of a 7B model (four of a mixture of experts), random weights, bfloat16, batch 1, nothing
compiled. Both sides take turns. A token's time has in it that keys grow by one with each.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
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
TOKENS, ROUNDS = 20, 6


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
def measured(model: Any, sides: tuple[str, str], length: int, number: int) -> dict[str, dict[str, Any]]:
    """Of each side that has memory enough: seconds of a prompt, of the first prompt of its length, and of a token, peak
    memory in bytes, and the last logits of the prompt. number: of the model, which gives it lengths of its own."""
    ids = torch.randint(0, 32000, (1, length), device="cuda")
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        torch.cuda.reset_peak_memory_stats()
        try:
            logits = prompt(model, side, ids).float()
        except torch.OutOfMemoryError:
            if side == "heedful":
                raise
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        found[side] = {"logits": logits, "memory": torch.cuda.max_memory_allocated()}
    caches = {side: prompt(model, side, ids, use_cache=True) for side in found}
    calls = {
        "prompt": {side: partial(prompt, model, side, ids) for side in found},
        "token": {side: partial(tokens, model, side, ids[:, -1:], cache) for side, cache in caches.items()},
    }
    times = {what: [{side: seconds(by[side]) for side in found} for _ in range(ROUNDS)] for what, by in calls.items()}
    times["first"] = [
        {side: seconds(partial(prompt, model, side, ids[:, 37 * turn + number :])) for side in found}
        for turn in range(1, ROUNDS + 1)
    ]
    for what, rounds in times.items():
        for side in found:
            # The first round compiles.
            found[side][what] = statistics.median(each[side] for each in rounds[1:])
    for side in found:
        found[side]["token"] /= TOKENS
    return found


def prompt(model: Any, side: str, ids: torch.Tensor, use_cache: bool = False) -> Any:
    """The last logits, or the cache."""
    model.set_attn_implementation(side)
    out = model(ids, use_cache=use_cache, logits_to_keep=1)
    return out.past_key_values if use_cache else out.logits


def tokens(model: Any, side: str, token: torch.Tensor, cache: Any) -> None:
    model.set_attn_implementation(side)
    for _ in range(TOKENS):
        model(token, past_key_values=cache, use_cache=True)


def line(name: str, length: int, theirs: str, found: dict[str, dict[str, Any]]) -> list[str]:
    cells = [name, f"{length:,}", theirs]
    for what, scale, unit in (
        ("prompt", 1e3, "ms"), ("first", 1e3, "ms"), ("token", 1e3, "ms"), ("memory", 2**-30, "GiB")
    ):  # fmt: skip
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
        print("| model | prompt | beside | a prompt | the first of its length | a token | peak memory | cosine |")
        print("|---|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for number, (name, (family, options, theirs, lengths)) in enumerate(MODELS.items()):
        if arguments.only is not None and arguments.only not in name:
            continue
        model = made(family, options | {"attn_implementation": theirs})
        for length in lengths:
            cells = line(name, length, theirs, measured(model, (theirs, "heedful"), length, number))
            print(f"| {' | '.join(cells)} |" if arguments.markdown else "  ".join(cells), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""One side of the decoder comparison in a process of its own, so that its peak memory is its own.

`python -m heedful.cli.demonstration.worker` reads requests as JSON lines from stdin and answers each with one JSON
line on stdout: first the settings of a model, which are not answered, then any number of requests that name a method.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Worker:
    """A randomly initialised Mistral-shaped model and the prompt it reads."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Build the model. settings: implementation, dtype, upcast (or None), seed, threads, shape, tokens."""
        import torch
        import transformers

        from heedful.measure.memory import peak_bytes, reset_peak

        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(settings["threads"])
        if settings["implementation"] == "heedful":
            import heedful.hf  # noqa: F401  registers the implementation
        torch.manual_seed(settings["seed"])
        config = transformers.MistralConfig(**settings["shape"])
        self.model: Any = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, settings["dtype"]), attn_implementation=settings["implementation"]
        ).eval()
        self.checksum = float(sum(tensor.sum(dtype=torch.float64) for tensor in self.model.parameters()))
        if settings["upcast"] is not None:
            self.model.to(getattr(torch, settings["upcast"]))
        self.tokens = torch.tensor([settings["tokens"]])
        # Drawing the weights takes more than holding them, and is no part of what is compared.
        reset_peak()
        self.loaded_bytes = peak_bytes()

    def loaded(self) -> dict[str, Any]:
        """A sum over all weights as they were drawn, and the memory held when loading was done."""
        return {"checksum": self.checksum, "loaded_bytes": self.loaded_bytes}

    def use(self, implementation: str) -> dict[str, Any]:
        """Go on with another attention implementation over the same weights."""
        if implementation == "heedful":
            import heedful.hf  # noqa: F401  registers the implementation

        self.model.set_attn_implementation(implementation)
        return {}

    def logits(self, length: int, positions: list[int], save: str) -> dict[str, Any]:
        """Logits (len(positions), vocabulary) in fp64 of a prompt's prefix, saved to a file."""
        import torch

        start = time.perf_counter()
        out = self.model(self.tokens[:, :length], use_cache=False, logits_to_keep=torch.tensor(positions)).logits
        seconds = time.perf_counter() - start
        torch.save(out[0].double(), save)
        return {"seconds": seconds}

    def prefill(self, length: int) -> dict[str, Any]:
        """Seconds until the logits after a prompt of this length."""
        start = time.perf_counter()
        self.model(self.tokens[:, :length], use_cache=True, logits_to_keep=1)
        return {"seconds": time.perf_counter() - start}

    def generate(self, length: int, steps: int, forced: list[int] | None, save: str) -> dict[str, Any]:
        """Greedy generation after a prompt of this length.

        The text goes on with the forced tokens where they are given, so that both sides answer for the same text;
        "chosen" is what this side would have said at each step. The logits (steps, vocabulary) are saved in fp32.
        """
        import torch
        from transformers import LogitsProcessor, LogitsProcessorList

        from heedful.measure.memory import peak_bytes

        seen: list[Tensor] = []
        moments: list[float] = []

        class Record(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                moments.append(time.perf_counter())
                seen.append(scores[0].float().clone())
                if forced is None:
                    return scores
                return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor(forced[len(seen) - 1]), 0.0)

        start = time.perf_counter()
        out = self.model.generate(
            self.tokens[:, :length],
            attention_mask=torch.ones(1, length, dtype=torch.long),
            do_sample=False,
            max_new_tokens=steps,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Record()]),
            return_dict_in_generate=True,
        )
        self.cache, self.last = out.past_key_values, out.sequences[:, -1:]
        logits = torch.stack(seen)
        torch.save(logits, save)
        return {
            "prefill_seconds": moments[0] - start,
            "tokens": out.sequences[0, length:].tolist(),
            "chosen": logits.argmax(-1).tolist(),
            "peak_bytes": peak_bytes(),
        }

    def go_on(self, steps: int) -> dict[str, Any]:
        """Seconds a token while the text of the last generation grows by some more."""
        start = time.perf_counter()
        for _ in range(steps):
            logits = self.model(self.last, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            self.last = logits[:, -1].argmax(-1, keepdim=True)
        return {"seconds": (time.perf_counter() - start) / steps}


def main() -> None:
    """Answer requests until stdin ends. Whatever else prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    worker = Worker(json.loads(sys.stdin.readline()))
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            answers.write(json.dumps(getattr(worker, request.pop("do"))(**request)) + "\n")


if __name__ == "__main__":
    main()

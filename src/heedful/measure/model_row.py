"""One decoded token through a Llama-shaped model from transformers, sdpa against heedful, against a long context."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .checks import Check, all_passed
from .numerics import RMS_FACTOR
from .rows import Outcome
from .timing import interleave, pinned_threads
from .workloads import Workload

if TYPE_CHECKING:
    from torch import Tensor

LAYERS = 4


def compare_decoding(workload: Workload, threads: int, seconds: float) -> Outcome:
    """Check one step's logits against fp32, then time steps of both sides turn by turn.

    The context is random keys and values put into each side's cache, transformers' DynamicCache and heedful's own. Both
    then grow as in generate().
    """
    try:
        import transformers
    except ImportError:
        return Outcome(note="not run: transformers is not installed")
    import torch

    import heedful
    import heedful.hf  # registers attn_implementation="heedful"

    hidden = workload.heads * workload.head_dim
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=workload.heads,
        num_key_value_heads=workload.key_heads,
        head_dim=workload.head_dim,
        vocab_size=32000,
        max_position_embeddings=4 * workload.key_length,
    )
    dtype = getattr(torch, workload.dtype)

    def build(dtype: Any, implementation: str) -> Any:
        # A model keeps the config that it is given: in a shared one the last model's implementation would hold for all.
        own = copy.deepcopy(config)
        model = transformers.AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=implementation)
        return model.eval()

    torch.manual_seed(0)
    theirs, ours = build(dtype, "sdpa"), build(dtype, "heedful")
    ours.load_state_dict(theirs.state_dict(), assign=True)

    shape = (1, workload.key_heads, workload.key_length, workload.head_dim)
    context = [(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)) for _ in range(LAYERS)]
    query = torch.randn(1, workload.heads, 1, workload.head_dim, dtype=dtype)
    backend = heedful.explain(query, *context[0]).backend
    token = torch.full((1, 1), 7)

    def cache(model: Any, cast: torch.dtype) -> Any:
        filled = heedful.hf.HeedfulCache(config=model.config) if model is ours else transformers.DynamicCache()
        for layer, (key, value) in enumerate(context):
            filled.update(key.to(cast), value.to(cast), layer)
        return filled

    def logits(model: Any, cast: torch.dtype) -> Tensor:
        out: Tensor = model(token, past_key_values=cache(model, cast)).logits
        return out.double()

    with torch.no_grad(), pinned_threads(threads):
        reference = build(torch.float32, "sdpa")
        reference.load_state_dict({name: tensor.float() for name, tensor in theirs.state_dict().items()}, assign=True)
        exact = logits(reference, torch.float32)
        del reference
        errors = [math.sqrt(float((logits(model, dtype) - exact).square().mean())) for model in (theirs, ours)]
        rule = "RMS error of the logits against the same weights in fp32 ≤ 1.3 × that of sdpa"
        checks = [Check(f"{workload.name}: logits", errors[1], RMS_FACTOR * errors[0], rule)]
        if not all_passed(checks):
            return Outcome(backend, checks=checks, note="numerical check failed: no speed-up is reported")

        def step(model: Any) -> Callable[[], object]:
            grown = cache(model, dtype)
            return lambda: model(token, past_key_values=grown).logits

        timing = interleave(step(theirs), step(ours), seconds=seconds, min_rounds=5)
    return Outcome(backend, timing, checks)

"""heedful as an attention implementation of Hugging Face transformers.

Importing this module registers `attn_implementation="heedful"`, for `from_pretrained`, `from_config` and
`model.set_attn_implementation`:

    import heedful.hf
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="heedful")

It takes the place of a mask tensor as well: causality, windows, chunks, padding and packed sequences reach the
attention call as patterns, made once a forward pass. What is not recognised goes as a `heedful.Mask` and is logged
once.

Models that compute their attention outside that interface are taken over by `patch`, in place:

    report = heedful.hf.patch(model)  # Longformer, LED, BigBird, BLOOM, MPT, Falcon

`HeedfulCache` is a cache for `generate` that no step copies:

    model.generate(**inputs, past_key_values=heedful.hf.HeedfulCache(config=model.config))
"""

from __future__ import annotations

from inspect import signature

import transformers
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

# Before 5.8 a mask function was not told where the queries begin.
if "q_offset" not in signature(masking_utils.sdpa_mask).parameters:
    raise ImportError(f"heedful.hf needs transformers 5.8 or newer, found {transformers.__version__}")

from heedful.hf.cache import HeedfulCache
from heedful.hf.forward import attention_forward
from heedful.hf.masks import PatternMask, pattern_mask
from heedful.hf.patches import PatchReport, patch, unpatch

__all__ = ["HeedfulCache", "PatchReport", "PatternMask", "attention_forward", "patch", "pattern_mask", "unpatch"]

AttentionInterface.register("heedful", attention_forward)
AttentionMaskInterface.register("heedful", pattern_mask)

"""The ladder: every component of a transformer at five levels of optimization that compute the same.

    block = heedful.levels.create("transformer_block", level=1, dim=256, heads=4)
    faster = heedful.levels.convert(block, level=5)

Level 1 is PyTorch written down plainly, 2 TorchScript, 3 torch.compile, 4 Triton, 5 heedful's C++ engine. All share
parameters, `state_dict` and signatures; outputs and gradients are within 1e-5 of each other in float32. `available`
says what this machine runs, `compare_optimization_levels` and `heedful levels` what each level is worth on it.
"""

from heedful.levels.base import Component
from heedful.levels.catalogue import COMPONENTS
from heedful.levels.comparison import LevelComparison, LevelResult, compare_optimization_levels
from heedful.levels.components import (
    Attention,
    FeedForward,
    LayerNorm,
    LayerNormGELU,
    MultiHeadAttention,
    TransformerBlock,
)
from heedful.levels.decoder import Decoder
from heedful.levels.ladder import LEVELS, Availability, available, convert, create

__all__ = [
    "COMPONENTS",
    "LEVELS",
    "Attention",
    "Availability",
    "Component",
    "Decoder",
    "FeedForward",
    "LayerNorm",
    "LayerNormGELU",
    "LevelComparison",
    "LevelResult",
    "MultiHeadAttention",
    "TransformerBlock",
    "available",
    "compare_optimization_levels",
    "convert",
    "create",
]

"""Modules: PyTorch's multi-head attention and encoder layer with heedful inside, rotary embeddings, bare attention,
fused operations."""

from heedful.nn.bare import MACoreAttention, SparseAttention, create_attention_layer
from heedful.nn.gated import GEGLU, GatedMLP, SwiGLU
from heedful.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from heedful.nn.multihead_attention import MultiheadAttention
from heedful.nn.rotary import RotaryEmbedding
from heedful.nn.swish import ParametricSwish
from heedful.nn.transformer import TransformerEncoderLayer

__all__ = [
    "GEGLU",
    "CrossEntropyLoss",
    "GatedMLP",
    "LinearCrossEntropyLoss",
    "MACoreAttention",
    "MultiheadAttention",
    "ParametricSwish",
    "RotaryEmbedding",
    "SparseAttention",
    "SwiGLU",
    "TransformerEncoderLayer",
    "create_attention_layer",
]

"""Modules: PyTorch's multi-head attention and encoder layer with heedful inside, rotary embeddings, bare attention,
fused operations."""

from heedful.nn.bare import MACoreAttention, SparseAttention, create_attention_layer
from heedful.nn.fused_attention import FusedAttention
from heedful.nn.multihead_attention import MultiheadAttention
from heedful.nn.rotary import RotaryEmbedding
from heedful.nn.swish import ParametricSwish
from heedful.nn.transformer import TransformerEncoderLayer

__all__ = [
    "FusedAttention",
    "MACoreAttention",
    "MultiheadAttention",
    "ParametricSwish",
    "RotaryEmbedding",
    "SparseAttention",
    "TransformerEncoderLayer",
    "create_attention_layer",
]

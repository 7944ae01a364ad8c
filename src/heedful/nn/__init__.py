"""Modules: PyTorch's multi-head attention and encoder layer with heedful inside, rotary embeddings, bare attention,
fused operations."""

from heedful.nn.bare import MACoreAttention, SparseAttention, create_attention_layer
from heedful.nn.fused_attention import FusedAttention
from heedful.nn.gated import GEGLU, GatedMLP, SwiGLU
from heedful.nn.losses import CrossEntropyLoss, LinearCrossEntropyLoss
from heedful.nn.multihead_attention import MultiheadAttention
from heedful.nn.norms import AddRMSNorm, LayerNormGELU, RMSNorm
from heedful.nn.rotary import RotaryEmbedding
from heedful.nn.softmax import Softmax
from heedful.nn.swish import ParametricSwish
from heedful.nn.transformer import TransformerEncoderLayer

__all__ = [
    "GEGLU",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "FusedAttention",
    "GatedMLP",
    "LayerNormGELU",
    "LinearCrossEntropyLoss",
    "MACoreAttention",
    "MultiheadAttention",
    "ParametricSwish",
    "RMSNorm",
    "RotaryEmbedding",
    "Softmax",
    "SparseAttention",
    "SwiGLU",
    "TransformerEncoderLayer",
    "create_attention_layer",
]

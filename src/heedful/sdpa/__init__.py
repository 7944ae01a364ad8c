"""The door for callers of PyTorch's `scaled_dot_product_attention`, by name or unchanged."""

from heedful.sdpa.activation import activate, deactivate
from heedful.sdpa.call import scaled_dot_product_attention

__all__ = ["activate", "deactivate", "scaled_dot_product_attention"]

"""The names of `pytorch_custom_ops`, a template of C++ operations.

    from heedful.compat.pytorch_custom_ops import ParametricSwish, fused_attention

What differs: its text divides the scores by `scale` while its code multiplies; here they are multiplied. Gradients
reach the inputs through the attention weights too, and `beta` may be learned.
"""

from heedful.nn import FusedAttention, ParametricSwish
from heedful.ops import fused_attention, parametric_swish

__all__ = ["FusedAttention", "ParametricSwish", "fused_attention", "parametric_swish"]

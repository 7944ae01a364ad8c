"""Which keys each query attends to: patterns, their algebra and their schedules."""

from heedful.patterns.banded import Causal, Dilated, Full, SlidingWindow
from heedful.patterns.base import Pattern
from heedful.patterns.blocks import BigBird, BlockSparse
from heedful.patterns.chunked import Chunked
from heedful.patterns.documents import Documents
from heedful.patterns.global_tokens import Global, Longformer
from heedful.patterns.mask import Mask
from heedful.patterns.padding import Padding
from heedful.patterns.prefix import Prefix

__all__ = [
    "BigBird",
    "BlockSparse",
    "Causal",
    "Chunked",
    "Dilated",
    "Documents",
    "Full",
    "Global",
    "Longformer",
    "Mask",
    "Padding",
    "Pattern",
    "Prefix",
    "SlidingWindow",
]

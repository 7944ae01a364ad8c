"""Level 2, TorchScript: the functions of level 1, compiled by `torch.jit.script`.

Over level 1: nothing in the formulas. Python leaves the inner path, and an optimizer sees each function as one graph.

Lesson: on a GPU TorchScript fuses elementwise chains into one kernel. On a CPU its fuser is off in PyTorch's builds,
so that nearly the same operators run and the same memory is passed over; what it saves is a little interpreter time,
and its separate backward graphs can cost more than that. It is deprecated in PyTorch 2.13 and absent from Python 3.14;
level 3 is what replaced it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from heedful.levels import level_1_pytorch as formulas

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    attention = torch.jit.script(formulas.attention)
    rope = torch.jit.script(formulas.rope)
    layer_norm = torch.jit.script(formulas.layer_norm)
    layer_norm_gelu = torch.jit.script(formulas.layer_norm_gelu)
    gelu = torch.jit.script(formulas.gelu)
    swiglu = torch.jit.script(formulas.swiglu)


class Cache(formulas.Cache):
    """As at level 1, with the scripted attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.key = torch.cat((self.key, k), 2)
        self.value = torch.cat((self.value, v), 2)
        result: Tensor = attention(q, self.key, self.value, True, scale)
        return result

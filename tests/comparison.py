"""One call of `heedful.attention` and everything that comes out of it, compared with the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tolerance import expected
from torch import Tensor

import heedful
from heedful.dropout import draw_seed, keep_mask

TENSORS = ("bias", "alibi_slopes", "sinks")
OUTPUTS = ("out", "lse", "weights")


@dataclass
class Compared:
    """What the call gave, detached; out and its gradient in index order (B, H, L, D) whatever the layout."""

    out: Tensor
    lse: Tensor
    weights: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    upstream: dict[str, Tensor] = field(default_factory=dict)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    through: tuple[str, ...] = (),
    upstream: dict[str, Tensor] | None = None,
    weights: bool | str = False,
    backend: str | None = "native",
    layout: str = "bhld",
    dropout_p: float = 0.0,
    device: str = "cpu",
    **options: object,
) -> Compared:
    """Runs the call. q, k and v come in index order (B, H, L, D); their strides reach the call as they are.

    device: where it runs; what it gave comes back to the CPU.
    through: the outputs that gradients of q, k, v and of the tensors among the options are taken through, from
        `upstream` or from random numbers.
    weights: as return_weights. They are asked for where `through` has them.
    """
    leaves = {"q": q, "k": k, "v": v} | {name: options[name] for name in TENSORS if options.get(name) is not None}
    leaves = {name: to_device(t.detach(), device).requires_grad_(bool(through)) for name, t in leaves.items()}
    weights = weights or "weights" in through
    turned = [leaves[n].transpose(1, 2) if layout == "blhd" else leaves[n] for n in "qkv"]
    random = torch.cuda if device == "cuda" else torch
    state = random.get_rng_state()
    found = heedful.attention(
        *turned,
        **options | {name: t for name, t in leaves.items() if name in TENSORS},
        dropout_p=dropout_p,
        layout=layout,
        return_lse=True,
        return_weights=weights,
        backend=backend,
    )
    kept = None
    if dropout_p:
        random.set_rng_state(state)
        kept = keep_mask(draw_seed(torch.device(device)).cpu(), dropout_p, (*q.shape[:3], k.shape[2])).double() / (
            1 - dropout_p
        )
    out = found.out.transpose(1, 2) if layout == "blhd" else found.out
    given = dict(zip(OUTPUTS, (out, found.lse, found.weights), strict=True))
    if weights == "sparse":
        given["weights"] = found.weights.to_dense()
    result = Compared(
        out.detach().cpu(),
        found.lse.detach().cpu(),
        None if weights is False else found.weights.detach().cpu(),
        kept=kept,
    )
    if through:
        upstream = {} if upstream is None else upstream
        result.upstream = {n: upstream[n] if n in upstream else torch.randn_like(given[n]).cpu() for n in through}
        outputs = [given[n] for n in through]
        arriving = [grad.to(device) for grad in result.upstream.values()]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), arriving, materialize_grads=True)
        result.gradients = dict(zip(leaves, (gradient.cpu() for gradient in gradients), strict=True))
    return result


def to_device(tensor: Tensor, device: str) -> Tensor:
    """A tensor there, with the strides that it has here."""
    if device == "cpu":
        return tensor
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.as_strided((extent if tensor.numel() else 0,), (1,)).to(device)
    return storage.as_strided(tensor.shape, tensor.stride())


def check(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Compared:
    """Runs the call as `run` and compares everything it gave with the reference; returns what it gave."""
    found = run(q, k, v, **options)
    beside = ("through", "upstream", "weights", "backend", "layout", "dropout_p", "device")
    named = {name: value for name, value in options.items() if name not in beside}
    upstream = {f"grad_{name}": t for name, t in found.upstream.items()}
    wanted = expected(q, k, v, kept=found.kept, **upstream, **named)
    assert found.out.dtype == q.dtype
    assert found.lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    wanted.out.check(found.out, "out")
    wanted.lse.check(found.lse, "lse")
    if found.weights is not None:
        assert found.weights.dtype == q.dtype
        dense = found.weights.to_dense() if found.weights.is_sparse else found.weights
        wanted.weights.check(dense, "weights")
    for name, gradient in found.gradients.items():
        given = {"q": q, "k": k, "v": v}.get(name, options.get(name))
        assert gradient.dtype == given.dtype, f"gradient of {name}: {gradient.dtype}"
        wanted.gradients[name].check(gradient, f"gradient of {name}")
    return found

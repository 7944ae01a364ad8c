"""What `heedful.graphs` raises beside errors of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heedful.graphs.watch import Finding

_MOST_SHOWN = 5


class CaptureError(RuntimeError):
    """A model could not be captured."""

    where: str | None
    """The innermost module that was running, by its name in the model and its class; None outside of any."""
    findings: tuple[Finding, ...]
    """The operations that a graph cannot hold, as a run outside of the capture showed them."""


def capture_error(what: str, error: BaseException, where: str | None, findings: Sequence[Finding]) -> CaptureError:
    """The error that says what broke a capture."""
    lines = [f"{what} cannot be captured: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]
    if where is not None:
        lines.append(f"  it broke in {where}")
    if findings:
        lines.append("  what a CUDA graph cannot hold, from a run outside of the capture:")
        lines += [f"    {finding}" for finding in findings[:_MOST_SHOWN]]
        if len(findings) > _MOST_SHOWN:
            lines.append(f"    and {len(findings) - _MOST_SHOWN} more")
    else:
        lines.append(
            "  no operator of PyTorch explains it: look for torch.cuda.synchronize(), work on another stream, or a "
            "library's call that waits for the device"
        )
    made = CaptureError("\n".join(lines))
    made.where, made.findings = where, tuple(findings)
    return made

"""What the engine says when it does not run a call."""

from __future__ import annotations

INVALID_ARGUMENT, UNSUPPORTED, OUT_OF_MEMORY = 1, 2, 3


class MFAError(RuntimeError):
    """A call that did not run, for a reason that no check of its arguments found.

    code: the engine's status: 1 an invalid argument (a context that is closed, too), 2 unsupported (a head dim above
        512), 3 out of memory.
    message: what it says of it.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} (status {self.code})"

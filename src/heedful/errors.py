"""The one exception of heedful's own, and the wording of the others."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """The call is right, and no backend (or not the one asked for) can run it."""

    reasons: dict[str, list[str]]
    """What each backend that was considered cannot do, by its name."""


def unsupported(message: str, reasons: dict[str, list[str]]) -> UnsupportedError:
    """The error that says so, with the reasons in its text too."""
    error = UnsupportedError("\n".join([message, *(f"  {name} {'; '.join(why)}" for name, why in reasons.items())]))
    error.reasons = reasons
    return error


def wrong_value(argument: str, got: object, takes: str) -> ValueError:
    """The error for an argument of the right type with a value that it cannot have."""
    return ValueError(f"{argument} takes {takes}, got {got}")


def wrong_type(argument: str, got: object, takes: str) -> TypeError:
    """The error for an argument of the wrong type or dtype."""
    return TypeError(f"{argument} takes {takes}, got {got}")

"""Real English text that every Python carries: the documentation topics behind `help()`."""

from __future__ import annotations

from collections.abc import Callable


def topics() -> list[str]:
    """Python's documentation topics in their own order, one text each."""
    from pydoc_data.topics import topics as pages

    return list(pages.values())


def passages(texts: list[str], count_tokens: Callable[[str], int], max_tokens: int) -> list[str]:
    """Cut texts at blank lines into passages that stay within max_tokens where a single paragraph does.

    Neighbouring paragraphs of one text are joined as long as they fit; a passage never spans two texts.
    """
    found: list[str] = []
    for text in texts:
        current, size = "", 0
        for paragraph in filter(str.strip, text.split("\n\n")):
            tokens = count_tokens(paragraph)
            if current and size + tokens > max_tokens:
                found.append(current)
                current, size = "", 0
            current, size = f"{current}\n\n{paragraph}" if current else paragraph, size + tokens
        if current:
            found.append(current)
    return found

"""Pictures of patterns."""

from __future__ import annotations

import os

import numpy as np

from heedful.patterns.base import Pattern

_COLOURS = {"empty": "#f2f2f2", "partial": "#9ecae1", "full": "#08519c"}


def plot(
    pattern: Pattern,
    path: str | os.PathLike[str],
    q_length: int,
    k_length: int,
    tile: int,
    batch_index: int,
    head_index: int,
) -> None:
    """Writes a PNG of the tiles of one batch item and head; see `Pattern.plot`."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tiles = classify(pattern, q_length, k_length, tile, batch_index, head_index)
    figure = Figure(figsize=(6.4, 6.4), layout="constrained")
    axes = figure.add_subplot()
    colours = list(_COLOURS.values())
    # Whole tiles are drawn; the last ones may reach past the lengths.
    extent = (0, tiles.shape[1] * tile, tiles.shape[0] * tile, 0)
    axes.imshow(tiles, cmap=ListedColormap(colours), vmin=0, vmax=2, extent=extent, interpolation="nearest")
    axes.set(xlim=(0, k_length), ylim=(q_length, 0), xlabel="key position j", ylabel="query position i")
    axes.set_title(repr(pattern), fontsize="medium", wrap=True)
    patches = [
        Patch(facecolor=colour, edgecolor="grey", label=f"{name}: {int((tiles == value).sum())}")
        for value, (name, colour) in enumerate(_COLOURS.items())
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, title=f"tiles of {tile} queries by {tile} keys")
    figure.savefig(path, format="png", dpi=120)


def classify(
    pattern: Pattern, q_length: int, k_length: int, tile: int, batch_index: int = 0, head_index: int = 0
) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """0, 1 or 2 for each tile of a batch item and head: empty, partial or full."""
    operands = pattern.operands(q_length, k_length)
    tiles = np.zeros((-(-q_length // tile), -(-k_length // tile)), dtype=np.uint8)
    starts = np.arange(0, k_length, tile)
    for row, start in enumerate(range(0, q_length, tile)):
        mask = pattern.schedule.rows(start, min(start + tile, q_length), q_length, k_length, operands)
        pairs = mask[batch_index if mask.shape[0] > 1 else 0, head_index if mask.shape[1] > 1 else 0].numpy()
        any_, all_ = (np.asarray(f.reduceat(pairs, starts, axis=1)) for f in (np.logical_or, np.logical_and))
        tiles[row] = any_.any(axis=0).astype(np.uint8) + all_.all(axis=0)
    return tiles

"""Pictures of weights, with the tokens as labels, and of masks with their tiles.

Every picture is a matplotlib `Figure` of its own, bound to no window and no global state; `save`
writes it as PNG and SVG. Labels and titles are drawn as they are: a `$` begins no formula.
Matplotlib is the extra `plots` and is imported when something is drawn.
"""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attention_jax.base import checks, files
from attention_jax.diagnostics import fonts
from attention_jax.masks import MaskLike, as_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_mask", "draw_weights", "heads", "masks", "save"]

_INCHES_A_TOKEN = 0.26
_LONGEST_LABELLED = 64
# How matplotlib's warning of a character without a glyph begins.
_BOX = r"Glyph \d+ .* missing from"
_STYLE: Any = {"svg.hashsalt": "attention_jax", "svg.fonttype": "path"}


def heads(
    weights: Any,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    across: int = 4,
) -> Figure:
    """Draw the weights of every head side by side, dark where a query (row) attends.

    Args:
      weights: [N, T, S], or [T, S] for one; from white at 0 to dark at 1 in all of them.
      query_labels: T tokens, on the left.
      key_labels: S tokens, below.
      titles: N of them; "head 0", "head 1", ... unless given.
      across: heads in a row.

    Raises:
      ShapeError: weights of other axes, or not one label for each token and one title a head.
      ImportError: matplotlib is not installed.

    >>> figure = heads(np.eye(3)[None], ["I", "see", "you"], ["je", "te", "vois"])
    >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
    ['je', 'te', 'vois']
    """
    weights = np.asarray(weights, np.float64)
    weights = weights[None] if weights.ndim == 2 else weights
    if weights.ndim != 3:
        raise checks.ShapeError(
            f"heads: weights must be [N, T, S] or [T, S], got shape {weights.shape}; choose one "
            "example of a batch."
        )
    number, query_length, key_length = weights.shape
    titles = [f"head {head}" for head in range(number)] if titles is None else titles
    if len(titles) != number:
        raise checks.ShapeError(
            f"heads: give one title for each of N = {number} heads, got {len(titles)}."
        )
    size = (_inches(key_length), _inches(query_length))
    figure, grid = _grid(number, across, size, share=True)
    for axes, title, of_head in zip(grid, titles, weights, strict=True):
        draw_weights(axes, of_head, query_labels, key_labels, title)
    for axes in grid[-across:]:  # those that have none below
        axes.tick_params(labelbottom=True)
    return figure


def draw_weights(
    axes: Axes,
    weights: Any,
    query_labels: Sequence[str] | None = None,
    key_labels: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw the weights [T, S] of one head into axes of your own; the arguments are of `heads`.

    Raises:
      ShapeError: not one label for each token.
    """
    weights = np.asarray(weights, np.float64)
    axes.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    axes.set_title(title, parse_math=False)
    _label(axes.yaxis, "query", "T", query_labels, weights.shape[0])
    _label(axes.xaxis, "key", "S", key_labels, weights.shape[1])
    if key_labels is not None:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(True)


def masks(
    named: Mapping[str, Any],
    query_length: int,
    key_length: int | None = None,
    tile_sizes: tuple[int, int] | None = None,
    across: int = 6,
) -> Figure:
    """Draw masks side by side: dark where a query may attend, shaded where a tile is live.

    Args:
      named: masks by title; each of one head and example (see `Mask.of`).
      query_length: T.
      key_length: S; T unless given.
      tile_sizes: queries and keys a tile; None draws no tiles.
      across: masks in a row.

    Raises:
      ImportError: matplotlib is not installed.

    >>> from attention_jax.masks import Causal
    >>> masks({"causal": Causal()}, 8, tile_sizes=(4, 4)).axes[0].get_title()
    'causal'
    """
    figure, grid = _grid(len(named), across, (2.2, 2.2))
    for axes, (title, mask) in zip(grid, named.items(), strict=True):
        draw_mask(axes, mask, query_length, key_length, tile_sizes, title)
    return figure


def draw_mask(
    axes: Axes,
    mask: MaskLike,
    query_length: int,
    key_length: int | None = None,
    tile_sizes: tuple[int, int] | None = None,
    title: str = "",
) -> None:
    """Draw one mask into axes of your own; the arguments are of `masks`."""
    mask = as_mask(mask)
    key_length = query_length if key_length is None else key_length
    picture = 2 * np.asarray(mask.to_dense(query_length, key_length), float)
    if tile_sizes is not None:
        rows, columns = tile_sizes
        states = np.asarray(mask.tiles(query_length, key_length, rows, columns))
        shade = np.kron(states, np.ones((rows, columns))) / 2
        picture = picture + shade[:query_length, :key_length]
    axes.imshow(picture, cmap="Blues", vmin=0, vmax=3, interpolation="nearest")
    axes.set_title(title, fontsize=9, parse_math=False)
    axes.set_xticks([])
    axes.set_yticks([])


def save(figure: Figure, path: str | pathlib.Path) -> list[pathlib.Path]:
    """Write `path`.png and `path`.svg, making the folder; the same figure gives the same bytes.

    Characters that the fonts in use lack are drawn in an installed font that has them. If there is
    none, they are boxes, of which one warning tells.

    Args:
      figure: what is drawn.
      path: without a suffix.

    Returns:
      Both paths.
    """
    import matplotlib as mpl

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "svg"))
    with mpl.rc_context(_STYLE), _no_warning_of_boxes():
        figure.draw_without_rendering()  # ticks have labels only then
        nowhere = fonts.complete(figure)
        files.write(png, _drawn(figure, format="png", dpi=160))
        files.write(svg, _drawn(figure, format="svg", metadata={"Date": None}))
    if nowhere:
        _tell_of_boxes(fonts.package(nowhere))
    return [png, svg]


def _drawn(figure: Figure, **how: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **how)
    return buffer.getvalue()


@contextlib.contextmanager
def _no_warning_of_boxes() -> Iterator[None]:
    """Pass on all warnings but those about characters without a glyph."""
    with warnings.catch_warnings(record=True) as said:
        warnings.filterwarnings("always", _BOX)
        yield
    for warning in said:
        if not re.match(_BOX, str(warning.message)):
            of = warning.category, warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, *of)


@functools.cache
def _tell_of_boxes(package: str) -> None:
    warnings.warn(
        "plots: no installed font has some of the characters, which are drawn as boxes; install "
        f"one that has them (Debian, Ubuntu: {package}).",
        stacklevel=3,  # where something is saved
    )


def _grid(
    number: int, across: int, size: tuple[float, float], share: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a grid of `number` pictures of a size in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "plots: matplotlib is not installed; install attention_jax with its extra 'plots'."
        ) from None
    across = max(min(across, number), 1)
    down = max(-(-number // across), 1)
    inches = (across * size[0] + 1.2, down * (size[1] + 0.3) + 0.6)
    figure = Figure(figsize=inches, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=share, sharey=share).flat
    for axes in grid[number:]:
        axes.set_visible(False)
    return figure, list(grid[:number])


def _inches(length: int) -> float:
    """Return the size of a picture in inches, with space for a label for each row or column."""
    return min(max(_INCHES_A_TOKEN * length + 0.3, 1.5), 6.0)


def _label(axis: Any, name: str, letter: str, labels: Sequence[str] | None, length: int) -> None:
    """Write the labels; of many, every n-th."""
    if labels is None:
        axis.set_ticks([])
        return
    if len(labels) != length:
        raise checks.ShapeError(
            f"plots: {name}_labels must have one label for each of {letter} = {length} tokens, "
            f"got {len(labels)}."
        )
    step = -(-length // _LONGEST_LABELLED)
    axis.set_ticks(range(0, length, step), list(labels)[::step], parse_math=False)

"""Explore weights in a browser: one HTML file, in which one sees where each token looks.

The page needs no network. It has a picture of every layer and head for the token under the
pointer, all weights of one of them, and a slider where weights of several steps are given.

Weights are kept as w = m (q / 255)^2, with m the largest weight of a row and q one byte: a weight
is off by at most 0.4% of the largest one of its row, and one of 4e-6 of it or less is zero.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import pathlib
import string
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from attention_jax.base import checks, files

__all__ = ["Explorer", "View", "explore"]

# Weights of one page. As text they take up to 1.4 times as many bytes, more than which browsers
# do not read at once.
_MOST = 2**28
_LEVELS = 255
# Characters that would end the script element, or that older parsers take for the end of a line.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}
# Of zlib: with more, large pages take seconds longer and are hardly smaller.
_EFFORT = 1
_HEIGHT = 900


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """The weights of one pair of sequences, in every layer and head, perhaps at several steps.

    Args:
      weights: [T, S], [N, T, S] or [L, N, T, S], not negative; with `steps` one of these for each.
      queries: T tokens.
      keys: S tokens; the queries unless given.
      steps: what the weights were measured after, such as steps of training.
      sides: what the two sequences are called.
      axes: what L and N are called.
      layers: L names; "layer 0", ... unless given.
      heads: N names; "head 0", ... unless given.
      gold: pairs (query, key) of positions that a gold alignment links.
    """

    weights: Any
    queries: Sequence[str]
    keys: Sequence[str] | None = None
    steps: Sequence[Any] = ()
    sides: tuple[str, str] = ("queries", "keys")
    axes: tuple[str, str] = ("layer", "head")
    layers: Sequence[str] | None = None
    heads: Sequence[str] | None = None
    gold: Sequence[tuple[int, int]] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Explorer:
    """A page of views by name; shown by a notebook, or saved.

    Args:
      views: what can be chosen; the first one is shown first.
      title: of the page.

    Raises:
      ShapeError: weights, tokens and names of a view do not fit.

    >>> both = {"encoder": View(np.eye(2), ["a", "b"]), "decoder": View(np.eye(2), ["c", "d"])}
    >>> "decoder" in Explorer(both).page()
    True
    """

    views: Mapping[str, View]
    title: str = "Attention"
    _records: list[dict[str, Any]] = dataclasses.field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.views:
            raise checks.ShapeError("explore: give at least one view, got none.")
        for name, view in self.views.items():
            self._records.append(_record(name, view, sum(r["weights"].size for r in self._records)))

    def fragment(self) -> str:
        """Return the explorer as HTML for a page of your own, with its style and script."""
        data = {"title": self.title, "views": [_packed(record) for record in self._records]}
        return _filled(
            "explorer.html",
            title=html.escape(self.title),
            style=_file("explorer.css"),
            script=_file("explorer.js"),
            data=json.dumps(data).translate(_ESCAPES),
        )

    def page(self) -> str:
        """Return the page: HTML in ASCII that loads nothing."""
        page = _filled("page.html", title=html.escape(self.title), explorer=self.fragment())
        return page.encode("ascii", "xmlcharrefreplace").decode()

    def save(self, path: str | pathlib.Path) -> pathlib.Path:
        """Write the page, making the folder, and return its path; equal views, equal bytes."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, self.page().encode("ascii"))
        return path

    def _repr_html_(self) -> str:
        """Show it in a notebook: in a frame, which keeps its style and names to itself."""
        return (
            f'<iframe data-attention-explorer title="{html.escape(self.title)}" '
            f'style="width: 100%; height: {_HEIGHT}px; border: 0" '
            f'srcdoc="{html.escape(self.page())}"></iframe>'
        )


def explore(
    weights: Any,
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    steps: Sequence[Any] = (),
    title: str = "Attention",
) -> Explorer:
    """Return a page on which hovering a token shows where it looks, in every layer and head.

    Args:
      weights: [T, S], [N, T, S] or [L, N, T, S], of one example, as `attend` returns them; with
        `steps` one of these for each.
      queries: T tokens.
      keys: S tokens; the queries unless given.
      steps: what the weights were measured after; the page then has a slider.
      title: of the page.

    Returns:
      An `Explorer`: a notebook shows it, and `save(path)` writes it. For several pairs of
      sequences, names of layers or a gold alignment build `Explorer` from `View`.

    Raises:
      ShapeError: weights that are negative or not finite, or not one token for each row and
        column; it says which axis.

    Vig 2019 (BertViz), section 3, shows heads and layers side by side in this way.

    >>> page = explore(np.eye(3)[None], ["I", "see", "you"], ["je", "te", "vois"])
    >>> page.save("weights.html")  # doctest: +SKIP
    """
    return Explorer({"": View(weights, queries, keys, steps)}, title)


def _record(name: str, view: View, before: int) -> dict[str, Any]:
    """Check a view and return it with weights [P, L, N, T, S] and all its names.

    Args:
      name: of the view.
      view: to be checked.
      before: weights of the page without this view.
    """
    about = f"explore, view {name!r}" if name else "explore"
    steps = [str(step) for step in view.steps]
    weights = _weights(about, view.weights, len(steps), before)
    queries, keys = list(view.queries), list(view.queries if view.keys is None else view.keys)
    layers, heads = (
        [f"{axis} {n}" for n in range(count)] if names is None else list(names)
        for axis, names, count in zip(
            view.axes, (view.layers, view.heads), weights.shape[1:3], strict=True
        )
    )
    named = {"layers": ("L", layers), "heads": ("N", heads), "queries": ("T", queries)}
    named["keys"] = ("S", keys)
    for (what, (letter, names)), size in zip(named.items(), weights.shape[1:], strict=True):
        if len(names) != size:
            raise checks.ShapeError(
                f"{about}: {what} must name each of {letter} = {size} of the weights, got "
                f"{len(names)}."
            )
    gold = [(int(query), int(key)) for query, key in view.gold]
    for query, key in gold:
        if not (0 <= query < len(queries) and 0 <= key < len(keys)):
            raise checks.ShapeError(
                f"{about}: gold links query {query} to key {key}, but there are {len(queries)} "
                f"queries and {len(keys)} keys, counted from 0."
            )
    return {
        "name": name,
        "queries": [str(token) for token in queries],
        "keys": [str(token) for token in keys],
        "sides": list(view.sides),
        "steps": steps,
        "axes": list(view.axes),
        "layers": layers,
        "heads": heads,
        "gold": gold,
        "shape": list(weights.shape),
        "weights": weights,
    }


def _weights(about: str, given: Any, steps: int, before: int) -> np.ndarray:
    """Return weights as [P, L, N, T, S] in float32."""
    try:
        weights = np.asarray(given)
    except ValueError:  # a sequence of arrays that differ
        raise checks.ShapeError(
            f"{about}: the weights of all steps, layers and heads must have one shape [T, S]; "
            "give those that differ as a view each."
        ) from None
    least, words = 2, "[T, S], [N, T, S] or [L, N, T, S]"
    if steps:
        least, words = 3, "with steps [P, T, S], [P, N, T, S] or [P, L, N, T, S]"
    if not least <= weights.ndim <= least + 2:
        raise checks.ShapeError(
            f"{about}: weights must be {words}, got shape {weights.shape}; choose one example of "
            "a batch."
        )
    if steps and len(weights) != steps:
        raise checks.ShapeError(
            f"{about}: steps must name each of P = {len(weights)} of the weights, got {steps}."
        )
    total = before + weights.size
    if total > _MOST:
        raise checks.ShapeError(
            f"explore: a page takes at most {_MOST:,} weights, got {total:,}; choose fewer layers, "
            "heads, steps or tokens."
        )
    leading = weights.shape[:-2] if steps else (1, *weights.shape[:-2])
    leading = (leading[0], *(1,) * (3 - len(leading)), *leading[1:])
    weights = weights.astype("<f4").reshape(*leading, *weights.shape[-2:])
    if 0 in weights.shape:
        raise checks.ShapeError(f"{about}: weights of shape {weights.shape} hold nothing to show.")
    if not np.isfinite(weights).all() or weights.min() < 0:
        bad = np.argwhere(~(np.isfinite(weights) & (weights >= 0)))[0]
        raise checks.ShapeError(
            f"{about}: weights must be finite and not negative, got {weights[tuple(bad)]} for "
            f"query {bad[-2]} and key {bad[-1]}; give what `attend` returns as weights."
        )
    return weights


def _packed(record: dict[str, Any]) -> dict[str, Any]:
    """Replace the weights of a record by one byte each, and the largest one of each row."""
    weights = record["weights"]
    largest = weights.max(axis=-1)
    levels = np.empty(weights.shape, np.uint8)
    for strip in np.ndindex(weights.shape[:3]):  # one at a time: the page may be large
        scale = np.where(largest[strip] > 0, largest[strip], 1)[:, None]
        levels[strip] = np.rint(_LEVELS * np.sqrt(weights[strip] / scale))
    kept = {name: value for name, value in record.items() if name != "weights"}
    return {**kept, "values": _text(levels), "maxima": _text(largest)}


def _text(array: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(array.tobytes(), level=_EFFORT)).decode()


def _file(name: str) -> str:
    folder = resources.files("attention_jax.diagnostics") / "page"
    return (folder / name).read_text(encoding="utf-8")


def _filled(name: str, **parts: str) -> str:
    return string.Template(_file(name)).substitute(parts)

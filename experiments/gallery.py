"""Draws every mask and published pattern: ``python -m experiments.gallery``.

In text, beside each the tiles that a tiled computation would visit; with --out=DIR also as PNG
and SVG.
"""

from __future__ import annotations

import difflib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags

from experiments import command_line
from experiments.command_line import UsageError

_HELP = """\
Draws every mask and published pattern: which key (column) a query (row) may attend to, and
beside it the tiles that are empty (.), partial or full.

  python -m experiments.gallery
  python -m experiments.gallery --only=bigbird,longformer --length=32 --tile=4
  python -m experiments.gallery --out=runs/gallery

  --only=      comma-separated names; all unless given
  --length=16  queries and keys, a multiple of --tile
  --tile=4     edge of a tile
  --out=       directory for gallery.png and gallery.svg; none written unless given"""

_NAMES = (
    "full", "causal", "window", "prefix_lm", "segments", "lengths", "strided", "fixed", "dilated",
    "chunked", "block", "global_tokens", "random_blocks", "sparse_strided", "sparse_fixed",
    "longformer", "longformer_dilated", "bigbird", "edges", "swin", "swin_shifted",
    "swin_in_window_order",
)  # fmt: skip


class Options(NamedTuple):
    """What to draw, how large, and where to save it."""

    only: tuple[str, ...]
    length: int
    tile: int
    out: pathlib.Path | None


def parse(arguments: Sequence[str]) -> Options:
    """Read the arguments behind the program's name.

    Raises:
      UsageError: an unknown flag or name, or a size that cannot be used.
      HelpRequested: the help text was asked for.

    >>> parse(["--only=causal", "--length=8"])
    Options(only=('causal',), length=8, tile=4, out=None)
    """
    values = flags.FlagValues()
    flags.DEFINE_list("only", list(_NAMES), "", flag_values=values)
    flags.DEFINE_integer("length", 16, "", flag_values=values)
    flags.DEFINE_integer("tile", 4, "", flag_values=values)
    flags.DEFINE_string("out", None, "", flag_values=values)
    given = command_line.parse_flags("gallery", values, arguments, lambda: _HELP)
    only, length, tile = given["only"], given["length"], given["tile"]
    if not only:
        raise UsageError("--only is empty; name at least one mask, or leave it out for all.")
    for name in only:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_NAMES)}."
            raise UsageError(f"--only: no mask {name!r}; {hint}")
    if tile < 1 or length < 4 or length > 256 or length % tile:
        raise UsageError(
            "--length must be 4 to 256 and a multiple of --tile, got "
            f"--length={length} and --tile={tile}."
        )
    out = pathlib.Path(given["out"]) if given["out"] else None
    if out:
        command_line.check_folder("out", out)
    return Options(tuple(only), length, tile, out)


def masks_of(length: int) -> dict[str, Callable[[], Any]]:
    """Return how each mask is made for a sequence of that length."""
    import jax
    import numpy as np

    from attention_jax import masks

    rng = jax.random.key(0)
    step = max(length // 4, 1)
    ids = np.arange(length) * 3 // length
    side = next(side for side in range(int(length**0.5), 0, -1) if length % side == 0)
    grid = (side, length // side)
    window = max(side // 2, 1)
    ring = [(i, (i + d) % length) for i in range(length) for d in (0, 1, step)]
    return {
        "full": masks.Full,
        "causal": masks.Causal,
        "window": lambda: masks.Window(step, 0),
        "prefix_lm": lambda: masks.Prefix(step) | masks.Causal(),
        "segments": lambda: masks.Segment(ids),
        "lengths": lambda: masks.Lengths(3 * step),
        "strided": lambda: masks.Strided(step),
        "fixed": lambda: masks.Fixed(step),
        "dilated": lambda: masks.Dilated(2, 2, 2),
        "chunked": lambda: masks.Chunked(step),
        "block": lambda: masks.Block(masks.Causal(), step),
        "global_tokens": lambda: masks.GlobalTokens(2),
        "random_blocks": lambda: masks.random_blocks(rng, length, 2, 2),
        "sparse_strided": lambda: masks.sparse_strided(step),
        "sparse_fixed": lambda: masks.sparse_fixed(step),
        "longformer": lambda: masks.longformer(4, tokens=1),
        "bigbird": lambda: masks.bigbird(rng, length, 2, num_global=1, num_random=1),
        "longformer_dilated": lambda: masks.longformer(4, dilation=[1, 2]).of(head=1),
        "edges": lambda: masks.edges(ring, length),
        "swin": lambda: masks.swin(*grid, window),
        "swin_shifted": lambda: masks.GridWindow(*grid, window, shift=window // 2),
        "swin_in_window_order": lambda: masks.window_order(masks.swin(*grid, window))[1],
    }


def in_text(name: str, mask: Any, length: int, tile: int) -> str:
    """Draw a mask with its tiles beside it."""
    import numpy as np

    from attention_jax.masks import EMPTY, draw

    states = np.asarray(mask.tiles(length, length, tile, tile))
    live = int((states != EMPTY).sum())
    tiles = ["".join("·▒█"[state] for state in row) for row in states]
    rows = draw(mask, length).splitlines()
    beside = [
        f"{row}   {tiles[i] if i < len(tiles) else ''}".rstrip() for i, row in enumerate(rows)
    ]
    title = f"{name}: {live} of {states.size} tiles of {tile} x {tile} are live"
    return "\n".join([title, *beside, ""])


def draw_all(options: Options) -> None:
    """Print the masks that are asked for, and save them as pictures."""
    makers = masks_of(options.length)
    chosen = {name: makers[name]() for name in options.only}
    for name, mask in chosen.items():
        command_line.show(in_text(name, mask, options.length, options.tile))
    if options.out:
        from attention_jax.diagnostics import plots

        figure = plots.masks(chosen, options.length, tile_sizes=(options.tile, options.tile))
        for path in plots.save(figure, options.out / "gallery"):
            command_line.show(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: see `command_line.run`."""
    return command_line.run("gallery", arguments, parse, draw_all)


if __name__ == "__main__":
    sys.exit(main())

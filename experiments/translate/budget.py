"""How large each translator is, and how to make them equally large."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from experiments.translate import mechanisms
from experiments.translate.config import CONTROLS, SCORES, Config
from experiments.translate.learning import count_parameters
from experiments.translate.model import Sizes

_TOLERANCE = 0.01
# A Transformer's feed-forward layers are this often as wide as the rest.
_HIDDEN = 4


def sizes_of(config: Config, source_words: int, target_words: int) -> dict[str, Sizes]:
    """Return the sizes of the translator of every score, matched if that is asked for.

    Raises:
      UsageError: what a score of the user's own names is none.
    """
    plain = Sizes(
        source_words=source_words,
        target_words=target_words,
        width=config.width,
        attention_size=config.head_size,
        readout_size=config.width * (_HIDDEN if config.model == "transformer" else 1),
        query=config.query,
        bridge=config.bridge,
        tied=config.projections == "tied",
        normed=config.qk_norm,
        model=config.model,
        heads=config.heads if config.model == "transformer" else 1,
        layers=config.layers,
        positions=config.positions,
    )
    for score in config.scores:
        if score not in SCORES + CONTROLS:
            _check(score, plain)
    first, *others = config.scores
    sizes = {first: plain}
    budget = count_parameters(first, plain)
    for score in others:
        sizes[score] = matched(score, plain, budget) if config.match_parameters else plain
    return sizes


def _check(score: str, sizes: Sizes) -> None:
    if sizes.model == "transformer":
        depth = sizes.attention_size
        make = functools.partial(mechanisms.score_of_head, score, depth)
    else:
        depth, size = sizes.width, sizes.attention_size
        switches = {"tied": sizes.tied, "normed": sizes.normed}
        make = functools.partial(mechanisms.score_of, score, depth, depth, size, **switches)
    mechanisms.check(score, make, depth, sizes.attention_size)


def matched(score: str, sizes: Sizes, budget: int) -> Sizes:
    """Return sizes with which a translator has `budget` parameters, or nearly so.

    Attention pays for the difference if it can. Where the score has no size to choose, the
    layers are made wider as long as the budget lasts, and the readout takes the rest.
    """

    def count(sizes: Sizes) -> int:
        return count_parameters(score, sizes)

    # Rotary positions turn pairs of features.
    pairs = 2 if sizes.positions == "rotary" else 1
    solved = _solve(lambda n: count(sizes._replace(attention_size=pairs * n)), budget)
    attended = sizes._replace(attention_size=pairs * solved)
    if abs(count(attended) - budget) <= _TOLERANCE * budget:
        return attended
    step = math.lcm(2, sizes.heads)
    widths = range(step, 4 * sizes.width + step, step)
    hidden = sizes.readout_size // sizes.width
    low, high = 0, len(widths)
    while high - low > 1:
        middle = (low + high) // 2
        wider = sizes._replace(width=widths[middle], readout_size=hidden * widths[middle])
        low, high = (middle, high) if count(wider) <= budget else (low, middle)
    wide = sizes._replace(width=widths[low], readout_size=hidden * widths[low])
    return wide._replace(
        readout_size=_solve(lambda n: count(wide._replace(readout_size=n)), budget)
    )


def _solve(affine: Callable[[int], int], wanted: int) -> int:
    """Return the whole number of at least 1 at which an affine function is nearest a value."""
    slope = affine(2) - affine(1)
    return max(1, 1 + round((wanted - affine(1)) / slope)) if slope else 1

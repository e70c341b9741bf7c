"""The conclusions of a sweep in a few sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from experiments.significance import seeds_needed
from experiments.translate.workdir import Record
from experiments.translate_sweep.config import RATE, Point, shown

# Statements, each with the points where it holds and a remark on each point.
Places = dict[str, list[tuple[Point, str]]]

_ALPHA = 0.05


def conclude(results: Record) -> str:
    """Return a paragraph of conclusions that never claims more than the tests show."""
    sentences = (
        *_compared(results),
        *_diverged(results["diverged"]),
        _about_rates(results),
        "Seeds stand for other initial weights and another order of the same sentences: nothing "
        "is said about other data, sizes or lengths of training.",
    )
    return " ".join(filter(None, sentences))


def _compared(results: Record) -> Iterable[str]:
    comparisons, seeds = results["comparisons"], results["config"]["seeds"]
    if not comparisons:
        yield "There are no two scores to compare."
        return
    tests = sum(found["p_value"] is not None for found in comparisons)
    corrected = f", corrected for all {tests} of the sweep" if tests > 1 else ""
    yield (
        f"Scores are compared by BLEU on test, each at its best learning rate by validation loss, "
        f"in paired permutation tests over {seeds} seed{'s' * (seeds > 1)}{corrected}."
    )
    smallest = min(1.0, tests * 2.0 ** (1 - seeds))
    if smallest > _ALPHA:
        yield (
            f"Nothing can be concluded about which score is better: with so few seeds the smallest "
            f"possible p is {smallest:.2g}; at least {seeds_needed(_ALPHA, tests)} seeds are "
            f"needed for p <= {_ALPHA:g}."
        )
        return
    shown_where: Places = defaultdict(list)
    not_shown: Places = defaultdict(list)
    for found in comparisons:
        first, second, difference = (found[k] for k in ("first", "second", "difference"))
        if found["conclusive"]:
            higher, lower = (first, second) if difference["mean"] > 0 else (second, first)
            by = f"by {abs(difference['mean']):.3g}"
            shown_where[f"{higher} is higher than {lower}"].append((found["point"], by))
        else:
            not_shown[f"{first} and {second}"].append((found["point"], ""))
    if shown_where:
        yield f"Shown (p <= {_ALPHA:g}): {_listed(shown_where)}."
    if not_shown:
        which = f" between {_listed(not_shown)}" if shown_where else ""
        yield f"No difference is shown{which}, which does not show that they are equal."


def _diverged(diverged: list[Record]) -> Iterable[str]:
    where: Places = defaultdict(list)
    for found in diverged:
        where[found["score"]].append((found["point"], ""))
    for score, points in where.items():
        yield f"{_listed({score: points})}: diverged at every learning rate, and not compared."


def _about_rates(results: Record) -> str:
    rates, mechanisms = results["rates"], results["mechanisms"]
    if len(rates) == 1:
        return f"One learning rate was tried, {rates[0]:g}; each score may do better at another."
    if not mechanisms:
        return ""
    ends = min(rates), max(rates)
    at_end = sum(mechanism[RATE] in ends for mechanism in mechanisms)
    if not at_end:
        return "No best learning rate is the smallest or the largest tried."
    return (
        f"{at_end} of {len(mechanisms)} best learning rates are the smallest or the largest tried, "
        "and a wider --learning_rate may change these results."
    )


def _listed(places: Places) -> str:
    """Join statements, each with the points where it holds.

    >>> _listed({"dot is higher": [({"width": 8}, "by 2"), ({"width": 16}, "by 3")]})
    'dot is higher at width=8 (by 2) and 16 (by 3)'
    """
    parts = []
    for what, points in places.items():
        where = []
        for number, (point, remark) in enumerate(points):
            # With one swept flag, name it once.
            named = len(point) > 1 or number == 0
            text = shown(point) if named else str(*point.values())
            where.append(f"{text} ({remark})" if text and remark else text or remark)
        joint = " at " if points[0][0] else " "
        parts.append((what + joint + _enumerated(where)).rstrip())
    return "; ".join(parts)


def _enumerated(texts: list[str]) -> str:
    """Join texts in prose: one, two and three."""
    *first, last = texts
    return " and ".join(filter(None, (", ".join(first), last)))

"""Whether a score reaches over the longest sentences, known before anything is trained."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from attention_jax.base.checks import ShapeError
from experiments.command_line import UsageError
from experiments.translate import decoding
from experiments.translate.config import Config
from experiments.translate.learning import graph_of
from experiments.translate.model import Sizes
from experiments.translate.task import Task


def check(score: str, sizes: Sizes, config: Config, task: Task) -> None:
    """Refuse a score that some sentences of a run are too long for, without computing anything.

    Raises:
      UsageError: one sentence with the flag that helps, if there is one.
    """
    widths = *task.training.widths, *task.widths
    source, target = (max(lengths) for lengths in zip(*widths, strict=True))
    shape = source, target, task.longest
    error = _mistake(score, sizes, *shape)
    if error is None:
        return
    remedy = "choose another score"
    for size in (source, max(shape)):
        if _mistake(score, sizes._replace(attention_size=size), *shape) is None:
            matched = config.match_parameters and score != config.scores[0]
            remedy = f"give an --attention_size of at least {size}"
            remedy += " and leave out --match_parameters" * matched
            break
    raise UsageError(f"--scores={score} does not fit this run: {reason(error)}; {remedy}.")


def reason(error: ShapeError) -> str:
    """Return what is wrong, without advice on calling the score."""
    return str(error).split(";")[0].rstrip(".")


def _mistake(score: str, sizes: Sizes, source: int, target: int, longest: int) -> ShapeError | None:
    """Return what reading pairs and translating raise, if they do."""
    graph, shapes = graph_of(score, sizes)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), shapes)
    sources, targets = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (source, target))
    try:
        jax.eval_shape(functools.partial(decoding.force, graph), parameters, sources, targets)
        jax.eval_shape(functools.partial(decoding.greedy, graph, longest), parameters, sources)
    except ShapeError as error:
        return error
    return None

"""A run before its training: its data, the sizes of its translators, and whether scores fit."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from attention_jax.base.checks import ShapeError
from experiments.command_line import UsageError, terminal
from experiments.translate import decode, mechanisms
from experiments.translate.checkpoints import Checkpoints
from experiments.translate.checks import CONTROLS, SCORES
from experiments.translate.config import Config
from experiments.translate.data import Task, load_task
from experiments.translate.log import ROUND, VALIDATION, Log
from experiments.translate.looking import LOOK
from experiments.translate.marks import mark_of
from experiments.translate.model import Sizes
from experiments.translate.train_step import count_parameters, graph_of

# Relative difference of parameter counts that is accepted without changing the layers.
_TOLERANCE = 0.01
# Width of a Transformer's feed-forward layers, in multiples of the model's width.
_HIDDEN = 4


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the translator.

    Attributes:
      config: from the command line.
      task: the data.
      sizes: the sizes of the translator of each score.
      console: where progress is shown.
    """

    config: Config
    task: Task
    sizes: Mapping[str, Sizes]
    console: Console = dataclasses.field(default_factory=terminal)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.config.directory

    @property
    def log(self) -> Log:
        """What training measures."""
        return Log(self.folder / "metrics.jsonl", mark_of(self.folder))

    @property
    def looks(self) -> Log:
        """What translators look at after each validation."""
        return Log(self.folder / "attention.jsonl", mark_of(self.folder))

    def gaps(self, score: str) -> list[str]:
        """Return a sentence for each log that lacks some of what was measured in training."""
        every, steps = self.config.evaluate_every, self.config.steps
        rounds = range(self.config.round, steps + 1, self.config.round)
        validated = [*range(every, steps, every), steps]
        found = (
            self.log.gap(score, ROUND, rounds),
            self.log.gap(score, VALIDATION, validated),
            self.looks.gap(score, LOOK, validated),
        )
        return [sentence for sentence in found if sentence]

    def checkpoints(self, score: str) -> Checkpoints:
        """Return the checkpoints of the translators of a score."""
        return Checkpoints.of_run(self.folder, score)

    def outcome(self, score: str) -> Path:
        """Return the file with what was measured of a score after training."""
        return self.folder / "outcomes" / f"{score}.json"


def prepare(
    config: Config, console: Console | None = None, load: Callable[[Config], Task] = load_task
) -> Run:
    """Load the data of a run and choose the sizes of its translators.

    Raises:
      UsageError: the data or a score cannot be used.
    """
    task = load(config)
    corpus = task.corpus
    sizes = sizes_of(config, len(corpus.source_vocabulary), len(corpus.target_vocabulary))
    return Run(config, task, sizes, console or terminal())


def sizes_of(config: Config, source_words: int, target_words: int) -> dict[str, Sizes]:
    """Return the sizes of the translator of every score, matched if the flags ask for it.

    Raises:
      UsageError: a score of the user's own is not a score.
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
            _check_is_score(score, plain)
    first, *others = config.scores
    sizes = {first: plain}
    budget = count_parameters(first, plain)
    for score in others:
        sizes[score] = matched(score, plain, budget) if config.match_parameters else plain
    return sizes


def _check_is_score(score: str, sizes: Sizes) -> None:
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

    The attention size is changed first. If the score has no such size, or it is not enough, the
    layers are made as wide as the budget allows, and the readout takes the rest.
    """
    # Rotary positions turn pairs of features.
    multiple = 2 if sizes.positions == "rotary" else 1
    attended = _solved(score, sizes, "attention_size", budget, multiple)
    if abs(count_parameters(score, attended) - budget) <= _TOLERANCE * budget:
        return attended
    return _solved(score, _widest(score, sizes, budget), "readout_size", budget)


def _solved(score: str, sizes: Sizes, field: str, budget: int, multiple: int = 1) -> Sizes:
    """Return sizes whose `field` brings the parameters, an affine function of it, to a budget.

    The field is the nearest positive multiple of `multiple`.
    """
    first = count_parameters(score, sizes._replace(**{field: multiple}))
    slope = count_parameters(score, sizes._replace(**{field: 2 * multiple})) - first
    number = max(1, 1 + round((budget - first) / slope)) if slope else 1
    return sizes._replace(**{field: number * multiple})


def _widest(score: str, sizes: Sizes, budget: int) -> Sizes:
    """Return the largest width, with a readout in proportion, that stays within a budget."""
    step = math.lcm(2, sizes.heads)
    widths = range(step, 4 * sizes.width + step, step)
    hidden = sizes.readout_size // sizes.width
    low, high = 0, len(widths)
    while high - low > 1:
        middle = (low + high) // 2
        wider = sizes._replace(width=widths[middle], readout_size=hidden * widths[middle])
        low, high = (middle, high) if count_parameters(score, wider) <= budget else (low, middle)
    return sizes._replace(width=widths[low], readout_size=hidden * widths[low])


def check_fits(score: str, run: Run) -> None:
    """Refuse a score that cannot take the longest sentences of a run; nothing is computed.

    Raises:
      UsageError: one sentence with the flag that helps, if there is one.
    """
    config, sizes = run.config, run.sizes[score]
    widths = *run.task.training.widths, *run.task.widths
    source, target = (max(lengths) for lengths in zip(*widths, strict=True))
    lengths = source, target, run.task.longest
    error = _shape_error(score, sizes, *lengths)
    if error is None:
        return
    remedy = "choose another score"
    for size in (source, max(lengths)):
        if _shape_error(score, sizes._replace(attention_size=size), *lengths) is None:
            matched = config.match_parameters and score != config.scores[0]
            remedy = f"give an --attention_size of at least {size}"
            remedy += " and leave out --match_parameters" * matched
            break
    raise UsageError(f"--scores={score} does not fit this run: {reason(error)}; {remedy}.")


def reason(error: ShapeError) -> str:
    """Return the message of an error without its advice on calling the score."""
    return str(error).split(";")[0].rstrip(".")


def _shape_error(
    score: str, sizes: Sizes, source: int, target: int, longest: int
) -> ShapeError | None:
    """Return the error of reading pairs and translating, if there is one."""
    graph, shapes = graph_of(score, sizes)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), shapes)
    sources, targets = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (source, target))
    try:
        jax.eval_shape(functools.partial(decode.force, graph), parameters, sources, targets)
        jax.eval_shape(functools.partial(decode.greedy, graph, longest), parameters, sources)
    except ShapeError as error:
        return error
    return None

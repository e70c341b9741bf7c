"""Training as a pure function: several steps of all seeds of one mechanism in one call.

Every seed has its own parameters, optimizer state, order of batches and dropout, on a leading
axis N over which the step is vectorised. All of them follow from seed and step alone, so that
an interrupted run resumes bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

from experiments.data.vocabulary import PAD
from experiments.translate import guided
from experiments.translate.config import Config
from experiments.translate.model import Graph, Sizes, Translator, token_losses
from experiments.translate.transformer import TransformerTranslator

Array = jax.Array

_MANY_PARAMETERS = 2**20


class State(NamedTuple):
    """The state of training, with an axis of seeds.

    Attributes:
      step: the number of steps taken.
      parameters: of the translators.
      optimizer: its moments.
      average: the mean of the parameters, see `averaged`; empty where none is kept.
    """

    step: Array
    parameters: Any
    optimizer: Any
    average: Any = ()

    @property
    def evaluated(self) -> Any:
        """The parameters that are evaluated: their mean, where it is kept."""
        return self.average if jax.tree.leaves(self.average) else self.parameters


def translator_of(score: str, sizes: Sizes, dropout: float = 0.0, **options: Any) -> Any:
    """Build a translator of the architecture that its sizes name; options are dtype and rngs."""
    kind = TransformerTranslator if sizes.model == "transformer" else Translator
    return kind(score, sizes, dropout, **options)


def graph_of(
    score: str, sizes: Sizes, dropout: float = 0.0, dtype: Any = None
) -> tuple[Graph, Any]:
    """Return the structure of a translator, and the shapes of its parameters."""
    build = functools.partial(translator_of, score, sizes, dropout, dtype=dtype)
    return nnx.split(nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), nnx.Param)


def count_parameters(score: str, sizes: Sizes) -> int:
    """Return the number of parameters of a translator."""
    return sum(leaf.size for leaf in jax.tree.leaves(graph_of(score, sizes)[1]))


def optimizer_of(config: Config) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) on clipped gradients, warmed up, then annealed.

    At least the last step is left to the cosine.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(round(config.warmup * config.steps), config.steps - 1),
        decay_steps=config.steps,
        end_value=0.01 * config.learning_rate,
    )
    return as_one_vector_if_small(
        optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay),
        )
    )


def as_one_vector_if_small(update: optax.GradientTransformation) -> optax.GradientTransformation:
    """Give an optimizer all parameters as one vector: one fused update instead of many.

    Large models are left as they are: concatenating them would take longer than it saves.
    """

    def chosen(tree: Any) -> optax.GradientTransformation:
        size = sum(leaf.size for leaf in jax.tree.leaves(tree))
        return optax.flatten(update) if size < _MANY_PARAMETERS else update

    def init(params: Any) -> Any:
        return chosen(params).init(params)

    def apply(updates: Any, state: Any, params: Any = None) -> Any:
        return chosen(updates).update(updates, state, params)

    return optax.GradientTransformation(init, apply)


def quick_options(effort: int) -> dict[str, int]:
    """Options for XLA's CPU compiler that limit the effort of LLVM, 0 to 3."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": effort} if on_cpu else {}


def initial_state(score: str, sizes: Sizes, config: Config) -> State:
    """Draw the parameters of every seed."""
    draw = functools.partial(_drawn, score, sizes, config)
    # It runs once: compiling it with little effort is faster.
    return jax.jit(draw, compiler_options=quick_options(0))()


def abstract_state(score: str, sizes: Sizes, config: Config) -> State:
    """Return the shapes of `initial_state`, without drawing anything."""
    return jax.eval_shape(functools.partial(_drawn, score, sizes, config))


def _drawn(score: str, sizes: Sizes, config: Config) -> State:
    # One seed after the other: batched QR decompositions, which draw orthogonal weights, can
    # deadlock on few processors (jaxlib 0.10).
    one_seed = functools.partial(_drawn_seed, score, sizes, config)
    parameters, optimizer = jax.lax.map(one_seed, jnp.arange(config.seeds))
    average = jax.tree.map(jnp.copy, parameters) if config.average else ()
    return State(jnp.int32(0), parameters, optimizer, average)


def _drawn_seed(score: str, sizes: Sizes, config: Config, seed: Array) -> tuple[Any, Any]:
    rngs = nnx.Rngs(jax.random.key(seed))
    translator = translator_of(score, sizes, config.dropout, rngs=rngs)
    parameters = nnx.state(translator, nnx.Param)
    return parameters, optimizer_of(config).init(parameters)


def words_of(target: Array, max_words: int | None) -> tuple[Array, Array | None]:
    """Return the words of target [B, T] without padding, [n], and their indices in T x B, [n].

    With fewer words than n = max_words the last are padding; with None all positions are
    returned, words [T, B], without indices.

    >>> words, where = words_of(jnp.array([[5, 2, 0], [6, 7, 2]]), 6)
    >>> words.tolist(), where.tolist()
    ([5, 6, 2, 7, 2, 0], [0, 1, 2, 3, 5, 6])
    """
    words = target.T
    if max_words is None:
        return words, None
    words = words.ravel()
    where = jnp.nonzero(words != PAD, size=max_words, fill_value=words.size)[0]
    return words.at[where].get(mode="fill", fill_value=PAD), where


def over_seeds(function: Callable[..., Any]) -> Callable[..., Any]:
    """Map a function over seeds, axis 0 of all arguments and results.

    A single seed is not vectorised: the product of two matrices is faster than that of two
    batches of one matrix each.
    """

    def of_every_seed(*operands: Any) -> Any:
        if jax.tree.leaves(operands)[0].shape[0] > 1:
            return jax.vmap(function)(*operands)
        found = function(*jax.tree.map(lambda x: x[0], operands))
        return jax.tree.map(lambda x: x[None], found)

    return of_every_seed


class Batches(NamedTuple):
    """The batches of some chunks of steps; each chunk takes its batches from one bucket.

    The leaves are arrays, or their shapes or shardings.

    Attributes:
      pairs: of each bucket all sentences, source [rows, S] and target [rows, T]; for guided
        alignment also links [rows, L, 2], see `guided.links_of`.
      order: the bucket of each chunk, [c].
      rows: the rows of each batch, [c, N, n, B].
    """

    pairs: Any
    order: Any
    rows: Any


def train(
    graph: Graph,
    config: Config,
    max_words: Sequence[int | None],
    axis: str | None,
    state: State,
    batches: Batches,
) -> tuple[State, Array]:
    """Take c chunks of n steps with every seed.

    Args:
      graph: from `graph_of`.
      config: of the run.
      max_words: of each bucket, an upper bound on the target words of a batch, or None: see
        `words_of`.
      axis: of the devices that share each batch, inside `jax.shard_map`; None for one device.
      state: with leading axis N of seeds.
      batches: for every step of every seed.

    Returns:
      The new state, and the mean loss of a token in every step, [c n, N].
    """
    # One program for all buckets keeps calls few: each gets fresh memory, page by page.
    chunks = [
        functools.partial(_take_chunk, graph, config, _Bucket(most, axis, *pairs))
        for most, pairs in zip(max_words, batches.pairs, strict=True)
    ]

    def chunk(state: State, taken: tuple[Array, Array]) -> tuple[State, Array]:
        bucket, rows = taken
        return jax.lax.switch(bucket, chunks, state, rows)

    state, losses = jax.lax.scan(chunk, state, (batches.order, batches.rows))
    return averaged(config, state), losses.reshape(-1, losses.shape[-1])


def averaged(config: Config, state: State) -> State:
    """Update the mean of the parameters after a round of steps.

    It is over the ends of the rounds in the last share `average` of the steps, as of checkpoints
    (Vaswani et al. 2017, section 6.1), and before them the parameters themselves.
    """
    if not config.average:
        return state
    begin = config.steps - round(config.average * config.steps)
    number = jnp.maximum((state.step - begin + config.round - 1) // config.round, 1)

    def mean(before: Array, now: Array) -> Array:
        return jnp.where(number > 1, before + (now - before) / number.astype(now.dtype), now)

    return state._replace(average=jax.tree.map(mean, state.average, state.parameters))


class _Bucket(NamedTuple):
    """A bound on target words, the axis of the devices, and the arrays of `Batches.pairs`."""

    max_words: int | None
    axis: str | None
    source: Array
    target: Array
    links: Array | None = None


def _take_chunk(
    graph: Graph, config: Config, bucket: _Bucket, state: State, rows: Array
) -> tuple[State, Array]:
    """Take n steps on rows [N, n, B] of one bucket."""
    loss = functools.partial(_loss, graph, config, bucket)
    take_step = functools.partial(_take_step, loss, bucket.axis, optimizer_of(config))
    seeds = jnp.arange(rows.shape[0])

    def one_step(state: State, rows: Array) -> tuple[State, Array]:
        every_seed = over_seeds(functools.partial(take_step, state.step))
        learned = state.parameters, state.optimizer
        (parameters, moments), losses = every_seed(seeds, learned, rows)
        return State(state.step + 1, parameters, moments, state.average), losses

    return jax.lax.scan(one_step, state, rows.swapaxes(0, 1))


def _take_step(
    loss: Callable[..., Array],
    axis: str | None,
    optimizer: optax.GradientTransformation,
    step: Array,
    seed: Array,
    learned: tuple[Any, Any],
    rows: Array,
) -> tuple[tuple[Any, Any], Array]:
    """Update parameters and moments of one seed on rows [B]; return them and the loss."""
    parameters, moments = learned
    rng = jax.random.fold_in(jax.random.key(seed), step)
    if axis:
        # Each device drops other features.
        rng = jax.random.fold_in(rng, jax.lax.axis_index(axis))
    value, gradient = jax.value_and_grad(loss)(parameters, rows, rng)
    value, gradient = _summed((value, gradient), axis)
    updates, moments = optimizer.update(gradient, moments, parameters)
    return (optax.apply_updates(parameters, updates), moments), value


def _summed(tree: Any, axis: str | None) -> Any:
    """Sum over devices, in one message."""
    if axis is None:
        return tree
    vector, restored = ravel_pytree(tree)
    return restored(jax.lax.psum(vector, axis))


def _loss(
    graph: Graph, config: Config, bucket: _Bucket, parameters: Any, rows: Array, rng: Array
) -> Array:
    """Return the share of these rows in the mean loss of a target token of a batch.

    With guided alignment that of a target token with a gold link is added, weighted.
    """
    parameters = jax.tree.map(lambda x: x.astype(config.dtype), parameters)
    source, target = bucket.source[rows], bucket.target[rows]
    words, where = words_of(target, bucket.max_words)
    logits, weights = nnx.merge(graph, parameters)(source, target, rng, where)
    losses = token_losses(logits.astype(jnp.float32), words, config.label_smoothing)
    count = jnp.sum(words != PAD, dtype=losses.dtype)
    loss = jnp.sum(losses) / _over_devices(count, bucket.axis)
    if bucket.links is None:
        return loss
    guide, aligned = guided.losses(weights, bucket.links[rows])
    aligned = jnp.maximum(_over_devices(aligned, bucket.axis), 1.0)
    return loss + config.guided_alignment * guide / aligned


def _over_devices(count: Array, axis: str | None) -> Array:
    return jax.lax.psum(count, axis) if axis else count

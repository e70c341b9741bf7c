"""Training as a pure function: some steps of all seeds of one mechanism, in one call.

Every seed has its own parameters, optimizer state, order of batches and dropout, on a leading
axis N over which the step is vectorised. All of them follow from seed and step alone, so that
a run that was interrupted goes on exactly as if it had not been.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.data.vocabulary import PAD
from experiments.translate.config import Config
from experiments.translate.model import Sizes, Translator
from experiments.translate.transformer import TransformerTranslator

Array = jax.Array
Graph = Any

_MANY_PARAMETERS = 2**20


class State(NamedTuple):
    """Where training stands: the number of steps taken, and parameters and optimizer per seed."""

    step: Array
    parameters: Any
    optimizer: Any


def translator_of(score: str, sizes: Sizes, dropout: float = 0.0, **options: Any) -> Any:
    """Build a translator of the architecture that its sizes name; options are dtype and rngs."""
    kind = TransformerTranslator if sizes.model == "transformer" else Translator
    return kind(score, sizes, dropout, **options)


def graph_of(
    score: str, sizes: Sizes, dropout: float = 0.0, dtype: Any = None
) -> tuple[Graph, Any]:
    """Return the structure of a translator, and the shapes of its parameters."""
    abstract = nnx.eval_shape(
        lambda: translator_of(score, sizes, dropout, dtype=dtype, rngs=nnx.Rngs(0))
    )
    return nnx.split(abstract, nnx.Param)


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
    """Show all parameters to an optimizer as one vector: one fused update instead of many.

    Not where there are many of them: copying them together would take longer than it saves.
    """

    def chosen(tree: Any) -> optax.GradientTransformation:
        size = sum(leaf.size for leaf in jax.tree.leaves(tree))
        return optax.flatten(update) if size < _MANY_PARAMETERS else update

    def init(params: Any) -> Any:
        return chosen(params).init(params)

    def updated(updates: Any, state: Any, params: Any = None) -> Any:
        return chosen(updates).update(updates, state, params)

    return optax.GradientTransformation(init, updated)


def quick_options(effort: int) -> dict[str, int]:
    """Options for XLA's CPU compiler that limit the effort of LLVM, 0 to 3."""
    on_cpu = jax.default_backend() == "cpu"
    return {"xla_backend_optimization_level": effort} if on_cpu else {}


def initial_state(score: str, sizes: Sizes, config: Config) -> State:
    """Draw the parameters of every seed."""
    draw = functools.partial(_drawn, score, sizes, config)
    # It runs once, so that the time to optimize it is lost.
    return jax.jit(draw, compiler_options=quick_options(0))()


def abstract_state(score: str, sizes: Sizes, config: Config) -> State:
    """Return the shapes of `initial_state`, without drawing anything."""
    return jax.eval_shape(functools.partial(_drawn, score, sizes, config))


def _drawn(score: str, sizes: Sizes, config: Config) -> State:
    def one_seed(seed: Array) -> tuple[Any, Any]:
        rngs = nnx.Rngs(jax.random.key(seed))
        translator = translator_of(score, sizes, config.dropout, rngs=rngs)
        parameters = nnx.state(translator, nnx.Param)
        return parameters, optimizer_of(config).init(parameters)

    # One seed after the other: on few processors, several batched QR decompositions at once, of
    # which orthogonal weights are made, can wait for each other for ever (jaxlib 0.10).
    parameters, optimizer = jax.lax.map(one_seed, jnp.arange(config.seeds))
    return State(jnp.int32(0), parameters, optimizer)


def token_losses(logits: Array, words: Array, smoothing: float = 0.0) -> Array:
    """Cross-entropy [...] of logits [..., W] with words [...], zero for padding.

    The wanted distribution has 1 - smoothing on the right word and spreads the rest evenly
    over all words (Szegedy et al. 2016, section 7).
    """
    right = jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    wanted = (1 - smoothing) * right + smoothing * jnp.mean(logits, axis=-1)
    losses = jax.nn.logsumexp(logits, axis=-1) - wanted
    return jnp.where(words == PAD, 0.0, losses)


def words_of(target: Array, most_words: int | None) -> tuple[Array, Array | None]:
    """Return the words of target [B, T] without padding, [n], and their indices of T x B, [n].

    If there are fewer than n = most_words, the last are padding; with None, all positions are
    returned, words [T, B], without indices.

    >>> words, where = words_of(jnp.array([[5, 2, 0], [6, 7, 2]]), 6)
    >>> words.tolist(), where.tolist()
    ([5, 6, 2, 7, 2, 0], [0, 1, 2, 3, 5, 6])
    """
    words = target.T
    if most_words is None:
        return words, None
    words = words.ravel()
    where = jnp.nonzero(words != PAD, size=most_words, fill_value=words.size)[0]
    return words.at[where].get(mode="fill", fill_value=PAD), where


def over_seeds(function: Callable[..., Any]) -> Callable[..., Any]:
    """Apply a function to every seed, on axis 0 of all that it takes and returns.

    A single seed is not vectorised: the product of two matrices is faster than that of two
    batches of one matrix each.
    """

    def of_every_seed(*operands: Any) -> Any:
        if jax.tree.leaves(operands)[0].shape[0] > 1:
            return jax.vmap(function)(*operands)
        found = function(*jax.tree.map(lambda x: x[0], operands))
        return jax.tree.map(lambda x: x[None], found)

    return of_every_seed


def train(
    graph: Graph,
    config: Config,
    most_words: Sequence[int | None],
    state: State,
    pairs: Sequence[tuple[Array, Array]],
    order: Array,
    rows: Array,
) -> tuple[State, Array]:
    """Take c chunks of n steps with every seed; a chunk takes its batches from one bucket.

    Args:
      graph: from `graph_of`.
      config: of the run.
      most_words: of each bucket, no batch of it has more target words; or None. See `words_of`.
      state: with leading axis N of seeds.
      pairs: of each bucket all sentences, source [rows, S] and target [rows, T].
      order: the bucket of each chunk, [c].
      rows: which to take in each step, [c, N, n, B].

    Returns:
      The new state, and the mean loss of a token in every step, [c n, N].
    """
    # One program for all buckets makes calls few: each gets fresh memory, page by page.
    chunks = [
        functools.partial(_take_steps, graph, config, most, *both)
        for most, both in zip(most_words, pairs, strict=True)
    ]

    def chunk(state: State, taken: tuple[Array, Array]) -> tuple[State, Array]:
        bucket, rows = taken
        return jax.lax.switch(bucket, chunks, state, rows)

    state, losses = jax.lax.scan(chunk, state, (order, rows))
    return state, losses.reshape(-1, losses.shape[-1])


def _take_steps(
    graph: Graph,
    config: Config,
    most_words: int | None,
    source: Array,
    target: Array,
    state: State,
    rows: Array,
) -> tuple[State, Array]:
    """Take n steps on rows [N, n, B] of one bucket."""
    optimizer = optimizer_of(config)

    def loss(parameters: Any, source: Array, target: Array, key: Array) -> Array:
        parameters = jax.tree.map(lambda x: x.astype(config.dtype), parameters)
        words, where = words_of(target, most_words)
        logits, _ = nnx.merge(graph, parameters)(source, target, key, where)
        losses = token_losses(logits.astype(jnp.float32), words, config.label_smoothing)
        return jnp.sum(losses) / jnp.sum(words != PAD, dtype=losses.dtype)

    def one_seed(step: Array, seed: Array, parameters: Any, moments: Any, rows: Array) -> Any:
        key = jax.random.fold_in(jax.random.key(seed), step)
        value, gradient = jax.value_and_grad(loss)(parameters, source[rows], target[rows], key)
        updates, moments = optimizer.update(gradient, moments, parameters)
        return optax.apply_updates(parameters, updates), moments, value

    seeds = jnp.arange(rows.shape[0])

    def one_step(state: State, rows: Array) -> tuple[State, Array]:
        every_seed = over_seeds(functools.partial(one_seed, state.step))
        parameters, moments, losses = every_seed(seeds, state.parameters, state.optimizer, rows)
        return State(state.step + 1, parameters, moments), losses

    return jax.lax.scan(one_step, state, rows.swapaxes(0, 1))

"""Continue sequences token by token, with any function that decodes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from attention_jax.base import checks

Array = jax.Array


def generate(
    decode: Callable[..., tuple[Array, Any]],
    caches: Any,
    prompt: Array,
    num_steps: int,
    *,
    lengths: Array | Sequence[int] | None = None,
    rng: Array | None = None,
    temperature: float | Array = 1.0,
    end: int | None = None,
) -> Array:
    """Continue prompts, by the most likely token at each step or by one that is drawn.

    Args:
      decode: `decode(tokens [B, T], caches, count=...)`, which returns logits [B, T, vocabulary]
        and the next caches.
      caches: empty; ragged if `lengths` is given.
      prompt: tokens [B, T], of any integer type, which the result has too.
      num_steps: how many tokens to add.
      lengths: how many tokens of each prompt count, [B]; the rest is padding.
      rng: a `jax.random` key to draw tokens; None takes the most likely.
      temperature: logits are divided by it before tokens are drawn.
      end: the token that ends a sequence: after it every token is `end` again, and no step is
        taken once all sequences have ended. None takes all steps.

    Returns:
      The tokens after each prompt, [B, num_steps].

    Raises:
      ValueError: no step, a temperature that is not positive where it is known outside `jit`, an
        end that is no token, or a prompt of a type that cannot hold every token.

    >>> def decode(tokens, caches, count):  # the next token is the last one plus 1
    ...     return jax.nn.one_hot(tokens + 1, 10), caches
    >>> generate(decode, (), jnp.array([[3, 4]]), 3)
    Array([[5, 6, 7]], dtype=int32)
    >>> generate(decode, (), jnp.array([[3], [7]]), 4, end=8)
    Array([[4, 5, 6, 7],
           [8, 8, 8, 8]], dtype=int32)
    """
    checks.at_least("generate", 1, num_steps=num_steps)
    if not isinstance(temperature, jax.core.Tracer) and temperature <= 0:
        raise ValueError(f"generate: temperature must be positive, got {temperature}.")
    choose = functools.partial(_choose, rng, temperature)
    lengths = lengths if lengths is None else jnp.asarray(lengths)
    logits, caches = decode(prompt, caches, count=lengths)
    _check_tokens(prompt, logits.shape[-1], end)
    last = jnp.broadcast_to(prompt.shape[1] if lengths is None else lengths, prompt.shape[:1]) - 1
    token = choose(jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], 0)
    token = token.astype(prompt.dtype)
    step = functools.partial(_step, decode, choose)
    if end is None:
        _, rest = jax.lax.scan(step, (token, caches), jnp.arange(1, num_steps))
        return jnp.concatenate([token[:, None], rest.swapaxes(0, 1)], axis=1)
    return _until(step, (token, caches), num_steps, jnp.asarray(end, prompt.dtype))


def with_types(
    decode: Callable[..., Any], types: Array | None, lengths: Array | Sequence[int] | None
) -> Callable[..., Any]:
    """Give `decode` the types [B, T] of a prompt, and then that of the last of its tokens."""
    if types is None:
        return decode
    types = jnp.asarray(types)
    count = types.shape[1] if lengths is None else jnp.asarray(lengths)
    last = jnp.broadcast_to(count, types.shape[:1])[:, None] - 1
    return functools.partial(_decode_typed, decode, types, jnp.take_along_axis(types, last, axis=1))


def _decode_typed(
    decode: Callable[..., Any], types: Array, last: Array, tokens: Array, caches: Any, count: Any
) -> Any:
    # A prompt of one token has its last type from the beginning.
    own = types if tokens.shape[1] == types.shape[1] else last
    return decode(tokens, caches, count=count, types=own)


def _check_tokens(prompt: Array, num_tokens: int, end: int | None) -> None:
    if num_tokens - 1 > jnp.iinfo(prompt.dtype).max:
        raise ValueError(
            f"generate: {prompt.dtype} cannot hold all of the {num_tokens} tokens; give the "
            "prompt as int32."
        )
    if end is not None and not isinstance(end, jax.core.Tracer) and not 0 <= end < num_tokens:
        raise ValueError(f"generate: end must be a token, 0 to {num_tokens - 1}, got {end}.")


def _step(
    decode: Callable[..., Any], choose: Callable[..., Array], carry: tuple[Array, Any], number: Any
) -> tuple[tuple[Array, Any], Array]:
    """Decode the last tokens [B], and return the next ones and caches, and the tokens again."""
    token, caches = carry
    logits, caches = decode(token[:, None], caches, count=None)
    following = choose(logits[:, 0], number).astype(token.dtype)
    return (following, caches), following


def _until(step: Callable[..., Any], carry: tuple[Array, Any], num_steps: int, end: Array) -> Array:
    """Take steps until every sequence has ended; return the tokens [B, num_steps]."""
    first = carry[0]
    written = jnp.full((*first.shape, num_steps), end).at[:, 0].set(first)

    def goes_on(state: tuple[Any, Array, Array]) -> Array:
        (token, _), _, number = state
        return (number < num_steps) & jnp.any(token != end)

    def go_on(state: tuple[Any, Array, Array]) -> tuple[Any, Array, Array]:
        (token, caches), written, number = state
        (following, caches), _ = step((token, caches), number)
        following = jnp.where(token == end, end, following)
        return (following, caches), written.at[:, number].set(following), number + 1

    state = jax.lax.while_loop(goes_on, go_on, (carry, written, jnp.asarray(1, jnp.int32)))
    return state[1]


def _choose(rng: Array | None, temperature: float | Array, logits: Array, step: Any) -> Array:
    """Return the most likely token of logits [B, vocabulary], or with a random key a drawn one."""
    if rng is None:
        return jnp.argmax(logits, axis=-1)
    logits = logits / jnp.asarray(temperature, logits.dtype)
    return jax.random.categorical(jax.random.fold_in(rng, step), logits)

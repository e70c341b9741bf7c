"""Filling logits with -1e9 masks them.

Source: The Annotated Transformer (Rush 2018), and the code of many courses.

Method: Five things a mask must do, asked of the textbook's softmax(where(mask, logits, -1e9)) v
and of `attend`: in float32 and float16 give zeros to a query that may attend to nothing, let NaN
in a masked value reach no output and in a masked key no gradient, and give masked pairs no weight.

Criterion: Holds if the textbook's way does all five, fails if it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attention_jax import attend
from experiments.claims.claim import Data, Setting, Verdict, fails, holds

Attention = Callable[..., jax.Array]


def filled(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Fill masked logits with -1e9, as in the textbook."""
    logits = query @ key.T / jnp.asarray(query.shape[-1] ** 0.5, query.dtype)
    return jax.nn.softmax(jnp.where(mask, logits, jnp.float32(-1e9).astype(logits.dtype))) @ value


def attended(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Mask with `attend`."""
    return attend(*(x[None, :, None] for x in (query, key, value)), mask=mask)[0, :, 0]


def _total(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, attention: Attention
) -> jax.Array:
    return jnp.sum(attention(query, key, value, mask))


def measure(setting: Setting, rng: jax.Array) -> Data:
    """Apply both to every case."""
    rows = jax.random.normal(rng, (3, 6, 4))
    mask = jnp.tri(6, dtype=bool).at[2].set(False)
    hidden = jnp.tri(6, k=-1, dtype=bool).at[:, -1].set(False)

    def empty_is_zero(attention: Attention, dtype: str = "float32") -> jax.Array:
        return jnp.all(attention(*rows.astype(dtype), mask)[2] == 0)

    def no_value_leaks(attention: Attention) -> jax.Array:
        value = rows[2].at[-1].set(jnp.nan)
        return jnp.all(jnp.isfinite(attention(rows[0], rows[1], value, hidden.at[0, 0].set(True))))

    def no_key_leaks(attention: Attention) -> jax.Array:
        memory, seen = rows[1].at[-1].set(jnp.nan), hidden.at[0, 0].set(True)
        gradient = jax.grad(_total)(rows[0], memory, rows[2], seen, attention)
        return jnp.all(jnp.isfinite(gradient))

    def no_weight(attention: Attention) -> jax.Array:
        seen = jnp.tri(6, dtype=bool)
        context = attention(rows[0], rows[1], jnp.eye(6), seen)
        return jnp.all(jnp.where(seen, 0.0, context) == 0)

    tests = {
        "a query that may attend to nothing gets zeros, float32": empty_is_zero,
        "the same in float16": lambda how: empty_is_zero(how, "float16"),
        "NaN in a masked value reaches no output": no_value_leaks,
        "NaN in a masked key reaches no gradient": no_key_leaks,
        "masked pairs have no weight": no_weight,
    }
    return {
        name: {"filled": bool(test(filled)), "attend": bool(test(attended))}
        for name, test in tests.items()
    }


def verdict(data: Data) -> Verdict:
    """Judge by the cases that filling fails."""
    broken = [name for name, of in data.items() if not of["filled"]]
    found = (
        f"Filling with -1e9 does {len(data) - len(broken)} of {len(data)} things, `attend` "
        f"{sum(of['attend'] for of in data.values())}."
    )
    return fails(f"{found} It fails at: {'; '.join(broken)}.") if broken else holds(found)


def table(data: Data) -> list[list[str]]:
    """Show which of the two passes each case."""
    words = {True: "yes", False: "no"}
    rows = [[name, words[of["filled"]], words[of["attend"]]] for name, of in data.items()]
    return [["what a mask must do", "fill with -1e9", "attend"], *rows]

"""The forward kernel: online softmax over the tiles of a row of queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from attention_jax.base.finite import finite
from attention_jax.base.matmul import times
from attention_jax.implementations import online
from attention_jax.implementations.pallas.blocks import Block, Kernel, Live, Sum
from attention_jax.implementations.pallas.parts import Head, Inputs, Pairs, Reader
from attention_jax.implementations.pallas.primitive import call
from attention_jax.implementations.tiles import Plan
from attention_jax.normalizers import LogSum

Array = jax.Array


def attend(head: Head, plan: Plan) -> tuple[Array, Array]:
    """Return context [T, V] and log-sum-exp [T], as `online.finished_finite` has it."""
    inputs = Inputs()
    forward = Forward(Reader.of(inputs, head))
    live = Live.of(plan, head.counts, "q")
    rows, depth = head.tile[0], head.operands.value.shape[1]
    dtype = head.operands.value.dtype
    kernel = Kernel(
        by="q",
        live=live,
        blocks=inputs.blocks,
        results=[(Block((rows, depth), "q."), dtype), (Block((1, rows), ".q"), jnp.float32)],
        counts=head.counts,
        tile=head.tile,
        sums=[Sum((rows, 1), -jnp.inf), Sum((rows, 1), 0.0), Sum((rows, depth), 0.0)],
        step=forward.step,
        finish=forward.finish,
        states=add_states(inputs, live, head),
    )
    context, logsumexp = call(kernel, *inputs.arrays)
    return context, logsumexp[0]


def add_states(inputs: Inputs, live: Live, head: Head) -> int | None:
    """Add what the tiles are, where only run time knows."""
    states = head.given.states
    if states is None:
        return None
    states = jnp.where(live.number < 0, 0, states[live.number].astype(jnp.int32))
    return inputs.add(states[None, :], Block((1, len(live.number)), ".."))


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """What is added up of a row: its largest logit, its sum of exponentials and its context.

    Poison goes into the sum alone, by which the context is divided in the end. Without sum, it
    is added to the context.
    """

    reader: Reader

    def step(
        self, masked: bool, sums: list[Array], values: Sequence[Array], i: Array, j: Array
    ) -> tuple[list[Array], list[Array]]:
        reader = self.reader
        maximum, total, context = sums
        pairs = Pairs.at(i, j, reader.head.tile)
        here = reader.read(values)
        logits, allowed = reader.logits_of(here, pairs), reader.may(masked, values, pairs)
        how, products = reader.head.how, reader.head.products
        if isinstance(how, LogSum):
            hidden = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
            exponents = reader.exponents_of(hidden, values, pairs)
            largest = jnp.maximum(maximum, jnp.max(exponents, axis=1, keepdims=True))
            base = jnp.where(largest == -jnp.inf, 0.0, largest)
            shrink = jnp.exp(maximum - base)
            weights = reader.weights_of(hidden, base, here, pairs)
            maximum, context = largest, context * shrink
            added = jnp.sum(online.magnitude(how, weights), axis=1, keepdims=True)
            total = total * shrink + added
        else:
            products = products.of_derivatives
            hidden = logits if allowed is None else jnp.where(allowed, logits, 0.0)
            weights = reader.weights_of(hidden, total, here, pairs)
            weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
        total = total + self.poison(allowed, values)
        keep = reader.kept(values, pairs)
        used = weights if keep is None else weights * keep
        return [maximum, total, context + times(used, finite(here.value), products)], []

    def poison(self, allowed: Array | None, values: Sequence[Array]) -> Array:
        """Return the poison of each row of a tile, [bt, 1]."""
        of_query, of_key = (values[n] for n in self.reader.poison)
        of_query = of_query.reshape(-1, 1)
        if allowed is None:
            return of_query + jnp.sum(of_key, axis=1, keepdims=True)
        return jnp.sum(jnp.where(allowed, of_query + of_key, 0.0), axis=1, keepdims=True)

    def finish(self, sums: list[Array], values: Sequence[Array]) -> list[Array]:
        maximum, total, context = sums
        if not isinstance(self.reader.head.how, LogSum):
            return [context + total, total.reshape(1, -1)]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total)
        largest = jnp.finfo(total.dtype).max
        logsumexp = jnp.where(empty, largest, maximum + jnp.log(total))
        return [context / total, logsumexp.reshape(1, -1)]

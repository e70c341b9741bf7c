"""The forward kernel: online softmax over the tiles of a row of queries."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attention_jax.base.matmul import times
from attention_jax.implementations import online
from attention_jax.implementations.pallas.blocks import Block, Kernel, Live, Sum, across
from attention_jax.implementations.pallas.parts import Head, Pairs, Reader
from attention_jax.implementations.pallas.primitive import call
from attention_jax.implementations.pallas.slots import Inputs
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
        sums=[Sum((rows, 1), -jnp.inf, True), Sum((rows, 1), 0.0, True), Sum((rows, depth), 0.0)],
        step=forward.step,
        finish=forward.finish,
        states=add_states(inputs, live, head),
        is_poisoned=forward.reader.is_poisoned,
        is_row_poisoned=None if isinstance(head.how, LogSum) else forward.reader.is_row_poisoned,
        only_on=head.only_on,
    )
    context, logsumexp = call(kernel, *inputs.arrays)
    return context, logsumexp[0]


def add_states(inputs: Inputs, live: Live, head: Head) -> int | None:
    """Add what the tiles are, where only run time knows."""
    states = head.given.states
    if states is None:
        return None
    if not len(states):
        states = jnp.zeros(len(live.number), jnp.int32)
    elif not np.array_equal(live.number, np.arange(len(states))):
        states = jnp.where(live.number < 0, 0, states[live.number])
    return inputs.add(states.astype(jnp.int32)[None, :], Block((1, len(live.number)), ".."))


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """What is added up of a row: its largest logit, its sum of exponentials and its context.

    Poison goes into the logits or the sum, by which the context is divided in the end. Without
    sum, it is added up in place of one, and then to the context.
    """

    reader: Reader

    def step(
        self,
        masked: bool,
        poisoned: bool,
        sums: list[Array],
        values: Sequence[Array],
        i: Array,
        j: Array,
    ) -> tuple[list[Array], list[Array]]:
        reader = self.reader
        pairs = Pairs.at(i, j, reader.head.tile)
        here = reader.read(values, poisoned)
        logits, allowed = reader.logits_of(here, pairs), reader.may(masked, values, pairs)
        add, products = self.add_weights, reader.head.products.of_derivatives
        if isinstance(self.how, LogSum):
            add, products = self.add_exponentials, reader.head.products
        poison = self.poison(values) if poisoned else None
        weigh = functools.partial(reader.weights_of, moving=here, pairs=pairs)
        exponents = functools.partial(reader.exponents_of, values=values, pairs=pairs)
        (maximum, total, context), weights = add(sums, (weigh, exponents), logits, allowed, poison)
        keep = reader.kept(values, pairs)
        used = weights if keep is None else weights * keep
        return [maximum, total, context + times(used, here.value, products)], []

    def add_exponentials(
        self, sums: list[Array], functions: Any, logits: Array, *given: Array | None
    ) -> tuple[list[Array], Array]:
        """Return the sums with a tile but for its context, and its weights."""
        (maximum, total, context), (allowed, poison) = sums, given
        weigh, exponents = functions
        if allowed is not None:
            logits = logits if poison is None else logits + poison
            logits = jnp.where(allowed, logits, -jnp.inf)
        largest = jnp.max(exponents(logits), axis=1, keepdims=True)
        largest = jnp.maximum(maximum, largest)
        base = jnp.where(largest == -jnp.inf, 0.0, largest)
        shrink = jnp.exp(maximum - base)
        weights = weigh(logits, across(base, logits.shape[1]))
        added = jnp.sum(online.magnitude(self.how, weights), axis=1, keepdims=True)
        if allowed is None and poison is not None:
            added = added + jnp.sum(poison)
        context = context * across(shrink, context.shape[1])
        return [largest, total * shrink + added, context], weights

    def add_weights(
        self, sums: list[Array], functions: Any, logits: Array, *given: Array | None
    ) -> tuple[list[Array], Array]:
        """Return the same where no sum of a row divides its weights."""
        (maximum, total, context), (allowed, poison) = sums, given
        weigh, _ = functions
        logits = logits if allowed is None else jnp.where(allowed, logits, 0.0)
        weights = weigh(logits, across(total, logits.shape[1]))
        weights = weights if allowed is None else jnp.where(allowed, weights, 0.0)
        if poison is not None:
            poison = poison if allowed is None else jnp.where(allowed, poison, 0.0)
            total = total + jnp.sum(poison, axis=1, keepdims=True)
        return [maximum, total, context], weights

    @property
    def how(self) -> online.OnePass:
        """How weights follow from logits."""
        return self.reader.head.how

    def poison(self, values: Sequence[Array]) -> Array:
        """Return what a tile adds to its logits, or without sum to its rows, of NaN and Inf.

        That of the queries is left to the end where there is a sum that says which are empty.
        """
        of_key = self.reader.key_poison(values)
        return of_key if isinstance(self.how, LogSum) else of_key + self.reader.query_poison(values)

    def finish(self, sums: list[Array], values: Sequence[Array]) -> list[Array]:
        maximum, total, context = sums
        if not isinstance(self.how, LogSum):
            return [context + across(total, context.shape[1]), _as_row(total)]
        empty = total == 0.0
        total = jnp.where(empty, 1.0, total + self.reader.query_poison(values))
        largest = jnp.finfo(total.dtype).max
        logsumexp = jnp.where(empty, largest, maximum + jnp.log(total))
        return [context / across(total, context.shape[1]), _as_row(logsumexp)]


def _as_row(of_rows: Array) -> Array:
    """Return a number for each row as [1, n]."""
    return of_rows.reshape(1, -1) if of_rows.shape[1] == 1 else of_rows.T[:1]

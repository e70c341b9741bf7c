"""What one device computes of attention, from its parts of the operands."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attention_jax.base.finite import finite, poison
from attention_jax.base.matmul import Products
from attention_jax.base.placement import Where, known
from attention_jax.implementations import choice
from attention_jax.implementations.dense import dense
from attention_jax.implementations.head import SAVED, Attended, Head
from attention_jax.implementations.lifting import lift
from attention_jax.implementations.tile_passes import Functions, Operands, Tiles
from attention_jax.implementations.tiled import padded, tiled, with_sink
from attention_jax.implementations.tiles import Plan as HeadPlan
from attention_jax.implementations.tiles import Visits
from attention_jax.operands import Operand
from attention_jax.parallel import chains, rounds
from attention_jax.parallel.placement import Placement
from attention_jax.parallel.plan import Plan
from attention_jax.scores.composition import identity

Array = jax.Array
Given = dict[str, Operand]


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """How a device attends; holds only what is known while tracing.

    Attributes:
      placement: who holds which positions.
      heads: "KG" or "K".
      travels: the dtype in which keys and in which values travel.
      wants_logsumexp: whether the log-sum-exp is asked for.
      products: how the products of tiles are computed.
    """

    placement: Placement
    heads: str
    travels: tuple[Any, Any]
    wants_logsumexp: bool
    products: Products

    @property
    def order(self) -> str:
        """The letters that are mapped, outermost first."""
        return f"B{self.heads}"

    @property
    def letters(self) -> Any:
        """The letters of context and log-sum-exp."""
        rows: Any = f"BT{self.heads}"
        return Attended(rows, None, rows if self.wants_logsumexp else None)

    def by_steps(
        self, given: Given, orders: tuple[Any, Any], plan: Plan, platform: str | None
    ) -> Attended:
        """Let keys come to the queries, over the steps of a plan."""
        score, of_score = self.whole(given["score"])
        score = score.multiplied(self.products)
        normalizer, of_normalizer = self.whole(given["normalizer"])
        bias, of_bias = self.whole(given["bias"])
        (query,), (key,), (value,) = (given[name].leaves for name in ("query", "key", "value"))
        query_poison, key_poison = poison(query), poison(key)
        key_letters, travels = "BSK", self.travels
        query = self.mapped(score.query_map, f"BT{self.heads}", query, of_score)
        if score.key_map.func is not identity.func:
            key_letters = f"BS{self.heads}" if any(of_score) else "BSK"
            value = value + key_poison[..., None]  # which the mapped key does not show
            key = self.mapped(score.key_map, key_letters, key, of_score)
            travels = key.dtype, travels[1]
        more = -query.shape[1] % plan.tile[0]
        of_pairs: Any = bias if callable(bias) else None
        bias = None if callable(bias) else bias
        if bias is not None and bias.shape[-2] > 1:
            bias = padded(bias, more, axis=bias.ndim - 2)
        operands = Operands(
            query=padded(query, more, axis=1),
            key=key,
            value=value,
            bias=bias,
            functions=Functions(score, of_pairs, normalizer),
            captured={},
        )
        operand_letters = [f"BT{self.heads}", key_letters, "BSK"]
        operand_letters += [*of_bias, *of_score] if of_pairs is None else [*of_score, *of_bias]
        (mask, of_mask), (dropout, of_dropout) = map(_whole, (given["mask"], given["dropout"]))
        local = rounds.Local(
            mask=plan.within(mask, self.placement.lengths[1]),
            captured={},
            dropout=dropout,
            query_poison=padded(query_poison, more, axis=1),
            orders=orders,
        )
        none = Visits(True, plan.tile[0], 1, np.zeros(0, np.int32), np.zeros((0, 1), np.int32))
        how = rounds.Rounds(
            plan=plan,
            placement=dataclasses.replace(self.placement, orders=(None, None)),
            letters=rounds.Letters([*operand_letters, *of_normalizer], of_mask, of_dropout),
            heads=self.heads,
            platform=platform,
            elsewhere=choice.elsewhere(None, plan, of_mask, platform),
            travels=travels,
            tiles=Tiles(plan.tile[1], [none], self.products, apart=self.is_apart(query)),
        )
        context, logsumexp = chains.attend(how, operands, local)
        context, logsumexp = (
            x[:, : given["query"].leaves[0].shape[1]] for x in (context, logsumexp)
        )
        return self.finished(normalizer, of_normalizer, context, logsumexp)

    def is_apart(self, query: Array) -> bool:
        """Tell whether devices may have different query heads of one key head."""
        return "G" in self.heads and bool(known(query))

    def finished(
        self, normalizer: Any, letters: list[str], context: Array, logsumexp: Array
    ) -> Attended:
        """Add the sink of a normalizer, once for all steps."""
        leaves, structure = jax.tree.flatten(normalizer)
        finish = functools.partial(_finished, structure, self.wants_logsumexp)
        axes = [self.letters.context, self.letters.context, *letters]
        return lift(finish, axes, self.letters, self.order)(context, logsumexp, *leaves)

    def whole(self, operand: Operand) -> tuple[Any, list[str]]:
        """Return a function of all heads, and the letters of its leaves: none, or the heads."""
        if not any(operand.axes) or operand.structure == jax.tree.structure(0):
            return _whole(operand)
        built = operand.build
        for _ in self.heads:
            built = jax.vmap(built)
        function = built(operand.leaves)
        return function, [self.heads] * len(jax.tree.leaves(function))

    def mapped(self, of_row: Any, letters: str, x: Array, of_score: list[str]) -> Array:
        """Apply the map of a score to rows that are cleaned, one or each head by its own."""
        if of_row.func is identity.func:
            return x
        leaves, structure = jax.tree.flatten(of_row)
        axes = [letters if "T" in letters else "BSK", *(of_score[:1] * len(leaves))]
        order = "B" + letters[2:]
        return lift(functools.partial(_mapped, structure), axes, letters, order)(x, *leaves)

    def by_heads(
        self,
        given: Given,
        orders: tuple[Any, Any],
        plan: HeadPlan | None,
        platform: str | None,
    ) -> Attended:
        """Exchange the sequence for heads, attend to whole sequences, and exchange back.

        Leaves with a letter K hold the heads of this device. Without a plan, `dense`.
        """
        inverse = [None if order is None else jnp.argsort(order) for order in orders]
        given = dict(given)
        for name, back in zip(
            ("query", "key", "value"), (*inverse[:1], *inverse[1:] * 2), strict=True
        ):
            (x,) = given[name].leaves
            x = self.exchanged(x, 2, 1, self.travels[name == "value"])
            given[name] = given[name]._replace(leaves=[_taken(x, back)])
        of_head: Callable[..., Attended] = dense
        if plan is not None:
            of_head = functools.partial(tiled, plan=plan, products=self.products)
        axes = [letters for operand in given.values() for letters in operand.axes]
        one = functools.partial(_one_head, of_head, given, self.wants_logsumexp)
        sequential, elsewhere = "", None
        if plan is not None:
            sequential, axes_of_mask = self.order, given["mask"].axes
            elsewhere = choice.elsewhere(None, plan, axes_of_mask, platform)
        lifted = lift(
            one,
            axes,
            self.letters,
            self.order,
            sequential,
            SAVED,
            Where(platform=platform),
            elsewhere,
        )
        attended = lifted(*(leaf for operand in given.values() for leaf in operand.leaves))
        context, logsumexp = attended.context, attended.logsumexp
        context = self.exchanged(_taken(context, orders[0]), 1, 2, self.travels[1])
        if logsumexp is not None:
            logsumexp = self.exchanged(_taken(logsumexp, orders[0]), 1, 2, logsumexp.dtype)
        return Attended(context, None, logsumexp)

    def exchanged(self, x: Array, split: int, join: int, dtype: Any) -> Array:
        """Split one axis over the devices and join another."""
        name = self.placement.axis.name
        return lax.all_to_all(x.astype(dtype), name, split, join, tiled=True).astype(x.dtype)


def _taken(x: Array, order: Any) -> Array:
    return x if order is None else jnp.take(x, order, axis=1, mode="clip")


def _whole(operand: Operand) -> tuple[Any, list[str]]:
    """Return an operand of all heads, and the letters of its leaves."""
    built = operand.build(operand.leaves)
    axes = operand.axes if any(operand.axes) else []
    return built, [*axes, *[""] * (len(jax.tree.leaves(built)) - len(axes))]


def _mapped(structure: Any, x: Array, *leaves: Any) -> Array:
    return jax.tree.unflatten(structure, leaves)(finite(x))


def _finished(
    structure: Any, wants_logsumexp: bool, context: Array, logsumexp: Array, *leaves: Any
) -> Attended:
    attended = with_sink(jax.tree.unflatten(structure, leaves), context, logsumexp)
    return attended if wants_logsumexp else Attended(attended.context)


def _one_head(
    of_head: Callable[..., Attended], given: Given, wants_logsumexp: bool, *leaves: Any
) -> Attended:
    rest = iter(leaves)
    built = {name: part.build([next(rest) for _ in part.leaves]) for name, part in given.items()}
    found = of_head(Head(**built))
    return Attended(found.context, logsumexp=found.logsumexp if wants_logsumexp else None)

"""The operands of `attend`, from arrays with heads to what one head is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax import checks, leading, masks
from attention_jax.binding import PerHead, as_pytree, unbound
from attention_jax.composition import is_positional, separate
from attention_jax.implementations.head import SAVED, Head, Result
from attention_jax.lifting import lift

Array = jax.Array


def function_of(function: Any) -> Any:
    """Return the function behind a `per_head` mark."""
    return function.function if isinstance(function, PerHead) else function


class Operands:
    """Collects the operands of `attend`, each as leaves with the letters of their axes."""

    def __init__(self, sizes: dict[str, int], dtype: Any):
        self.sizes, self.dtype = sizes, dtype
        self.groups = sizes["N"] // sizes["K"]
        self.heads = "KG" if self.groups > 1 else "K"
        self.leaves: list[Array] = []
        self.axes: list[str] = []
        self.mask_axes: list[str] = []
        self.rebuild: dict[str, Callable[[list[Array]], Any]] = {}

    def add(self, name: str, leaf: Any, letters: str) -> None:
        """Add one array whose axes begin with `letters`; N is split into K and G."""
        self.add_tree(name, leaf, lambda _: letters)

    def add_tree(self, name: str, tree: Any, letters_of: Callable[[Any], str]) -> None:
        leaves, structure = jax.tree.flatten(tree)
        start = len(self.leaves)
        for leaf in leaves:
            letters = letters_of(leaf)
            self.leaves.append(self._grouped(self._cast(leaf), letters))
            self.axes.append(letters.replace("N", self.heads))
        stop = len(self.leaves)
        self.rebuild[name] = lambda arrays: jax.tree.unflatten(structure, arrays[start:stop])

    def add_function(self, name: str, function: Any, read: Callable[[Any], Any]) -> None:
        """Add a bound score, bias or normalizer, the same for all heads or one slice for each."""
        heads = isinstance(function, PerHead)
        if heads:
            for leaf in jax.tree.leaves(function):
                if jnp.shape(leaf)[:1] != (self.sizes["N"],):
                    raise checks.ShapeError(
                        f"attend: every parameter of a per_head {name} must have axis 0 of size "
                        f"N = {self.sizes['N']}, got shape {jnp.shape(leaf)}."
                    )
        bound = as_pytree(function_of(function))
        waiting = [] if is_positional(bound) else unbound(bound)
        if waiting:
            raise TypeError(
                f"attend: {name} still waits for {', '.join(waiting)}; give them with "
                f"bind({name}, {waiting[0]}=...)."
            )
        self.add_tree(name, bound, lambda _: "N" if heads else "")
        build = self.rebuild[name]
        self.rebuild[name] = lambda arrays: read(build(arrays))

    def check_score(self, score: Any) -> None:
        """Ask the score for the shape of its logits, so that its own checks speak first."""
        bound = as_pytree(function_of(score))
        if isinstance(score, PerHead):
            bound = jax.tree.map(lambda leaf: leaf[0], bound)
        bound = jax.tree.map(self._cast, bound)
        rows = (
            jax.ShapeDtypeStruct((self.sizes[length], self.sizes[depth]), self.dtype)
            for length, depth in ("TQ", "SH")
        )
        read = separate(bound) if is_positional(bound) else bound
        logits = jax.eval_shape(lambda query, key: read(query, key), *rows)
        expected = (self.sizes["T"], self.sizes["S"])
        if jnp.shape(logits) != expected:
            raise checks.ShapeError(
                f"attend: score must return logits [T, S] = {expected}, got shape "
                f"{jnp.shape(logits)}."
            )

    def add_mask(self, mask: masks.Mask) -> None:
        mask, letters = leading.of_mask("attend", mask, self.sizes)
        self.mask_axes = [axes.replace("N", self.heads) for axes in letters]
        of_next_leaf = iter(letters)
        self.add_tree("mask", mask, lambda _: next(of_next_leaf))

    def add_bias(self, bias: Any) -> None:
        if bias is None:
            self.rebuild["bias"] = lambda _: None
        elif callable(function_of(bias)):
            self.add_function("bias", bias, lambda bound: bound)
        else:
            self.add("bias", *leading.of_array("attend: bias", jnp.asarray(bias), self.sizes))

    def add_dropout(self, rate: float, key: Any) -> None:
        if not rate:
            self.rebuild["dropout"] = lambda _: None
            return
        batch, heads = self.sizes["B"], self.sizes["N"]
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(batch * heads))
        words = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
        self.add("dropout", words.reshape(batch, heads, 2), "BN")
        build = self.rebuild["dropout"]
        self.rebuild["dropout"] = lambda arrays: (build(arrays), jnp.float32(rate))

    def run(
        self, implementation: Callable[[Head], Result], want_weights: bool, sequential: str
    ) -> Result:
        """Run an implementation of one head over all heads and examples."""

        def one_head(*arrays: Array) -> tuple[Array | None, ...]:
            head = Head(**{name: build(list(arrays)) for name, build in self.rebuild.items()})
            result = implementation(head)
            return tuple(result if want_weights else result._replace(weights=None))

        axes = tuple(letters.replace("N", self.heads) for letters in ("BTN", "BN", "BTN"))
        lifted = lift(one_head, self.axes, axes, f"B{self.heads}", sequential, SAVED)
        results = lifted(*self.leaves)
        return Result(*jax.tree.map(self._ungrouped, results, jax.tree.broadcast(axes, results)))

    def _ungrouped(self, x: Array, letters: str) -> Array:
        axis = letters.index("K")
        return x.reshape(x.shape[:axis] + (self.sizes["N"],) + x.shape[axis + len(self.heads) :])

    def _grouped(self, leaf: Array, letters: str) -> Array:
        if "N" not in letters or self.groups == 1:
            return leaf
        axis = letters.index("N")
        heads = (self.sizes["K"], self.groups)
        return leaf.reshape(leaf.shape[:axis] + heads + leaf.shape[axis + 1 :])

    def _cast(self, leaf: Any) -> Any:
        is_floating = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, self.dtype) if is_floating else leaf

"""The operands of `attend`, from arrays with heads to what one head is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention_jax import masks
from attention_jax.base import checks
from attention_jax.base.binding import PerHead, as_pytree, unbound
from attention_jax.base.parameters import Learned
from attention_jax.implementations.head import SAVED, Head, Result
from attention_jax.implementations.lifting import lift
from attention_jax.masks import batch_axes
from attention_jax.masks.intervals import indices
from attention_jax.normalizers import streaming
from attention_jax.scores import separate
from attention_jax.scores.composition import finished, is_positional

Array = jax.Array


def function_of(function: Any) -> Any:
    """Return the function behind a `per_head` mark."""
    return function.function if isinstance(function, PerHead) else function


def as_bias(bias: Any) -> Any:
    """Return a bias as it is, where it is a function, and numbers as an array.

    Raises:
      TypeError: a bias whose parameters are declared and not there.

    >>> as_bias([[1.0, 2.0]]).shape
    (1, 2)
    """
    _refuse_declared("bias", bias)
    return bias if bias is None or callable(function_of(bias)) else jnp.asarray(bias)


def _refuse_declared(name: str, function: Any) -> None:
    """Refuse a function whose parameters are declared for a module to create."""
    if isinstance(function, Learned):
        names = ", ".join(function.parameters)
        raise TypeError(
            f"attend: {name} still waits for {names}, which modules create; give it to a module, "
            "or bind its function to arrays."
        )


class KeyOfExample(NamedTuple):
    """A dropout key for a part of a batch that begins with the example `number`."""

    key: Any
    number: Any


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
        _refuse_declared(name, function)
        if not callable(function_of(function)):
            example = {"score": "scores.scaled_dot", "normalizer": "normalizers.softmax"}[name]
            raise TypeError(
                f"attend: {name} must be a function such as {example}, got {function!r}."
            )
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

    def add_score(self, score: Any) -> None:
        """Add the score, and ask it for its logits' shape, so that its own checks speak first."""
        self.add_function("score", score, separate)
        bound = self._of_one_head(score)
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
        if logits.dtype != self.dtype:
            build = self.rebuild["score"]
            cast = Partial(lambda logits: logits.astype(self.dtype))
            self.rebuild["score"] = lambda arrays: finished(build(arrays), cast)

    def add_normalizer(self, normalizer: Any) -> None:
        """Add the normalizer, and ask one that is the user's own for the shape of its weights."""
        self.add_function("normalizer", normalizer, as_pytree)
        if streaming(function_of(normalizer)) is not None:
            return
        bound = self._of_one_head(normalizer)
        expected = (self.sizes["T"], self.sizes["S"])
        logits, allowed = (jax.ShapeDtypeStruct(expected, of) for of in (self.dtype, bool))
        refusal = (
            f"attend: normalizer must map (logits, allowed), both [T, S] = {expected}, to weights "
            "[T, S], as normalizers.softmax does"
        )
        try:
            weights = jax.eval_shape(lambda *given: bound(*given), logits, allowed)
        except TypeError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise TypeError(f"{refusal}; this one fails: {reason}.") from error
        if jnp.shape(weights) != expected:
            raise checks.ShapeError(f"{refusal}; this one returns shape {jnp.shape(weights)}.")

    def add_mask(self, mask: masks.Mask) -> None:
        mask, letters = batch_axes.of_mask("attend", mask, self.sizes)
        self.mask_axes = [axes.replace("N", self.heads) for axes in letters]
        of_next_leaf = iter(letters)
        self.add_tree("mask", mask, lambda _: next(of_next_leaf))

    def add_bias(self, bias: Any) -> None:
        bias = as_bias(bias)
        if bias is None:
            self.rebuild["bias"] = lambda _: None
        elif callable(function_of(bias)):
            self.add_function("bias", bias, lambda bound: bound)
            self._check_bias(bias)
        else:
            self.add("bias", *batch_axes.of_array("attend: bias", bias, self.sizes))

    def _check_bias(self, bias: Any) -> None:
        """Ask a bias for its shape, of all pairs and of one: it is to answer for any tile."""
        bound = self._of_one_head(bias)
        for expected in ((self.sizes["T"], self.sizes["S"]), (1, 1)):
            q_idx, kv_idx = (
                jax.ShapeDtypeStruct(shape, jnp.int32)
                for shape in ((expected[0], 1), (1, expected[1]))
            )
            shape = jnp.shape(jax.eval_shape(lambda *pair: bound(*pair), q_idx, kv_idx))
            padded = (1,) * (2 - len(shape)) + shape
            if len(shape) > 2 or any(
                got not in (1, full) for got, full in zip(padded, expected, strict=True)
            ):
                raise checks.ShapeError(
                    "attend: bias must return numbers that broadcast to its indices [T, S] = "
                    f"{expected}, got shape {shape}."
                )

    def add_dropout(self, rate: float, key: Any) -> None:
        if not rate:
            self.rebuild["dropout"] = lambda _: None
            return
        batch, heads = self.sizes["B"], self.sizes["N"]
        key, first = key if isinstance(key, KeyOfExample) else (key, 0)
        numbers = indices(batch * heads) + first * heads
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, numbers)
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

    def _of_one_head(self, function: Any) -> Any:
        """Return a bound function as the first head has it."""
        bound = as_pytree(function_of(function))
        if isinstance(function, PerHead):
            bound = jax.tree.map(lambda leaf: leaf[0], bound)
        return jax.tree.map(self._cast, bound)

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

"""From tokens or images to vectors, and from vectors to logits, in either Flax API."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.base.binding import bind
from attention_jax.masks.intervals import indices
from attention_jax.positions import sinusoidal

Array = jax.Array


def position_of_depth(position: Any, features: int) -> Any:
    """Return a position for vectors of D features: `sinusoidal` itself needs to be told.

    >>> position_of_depth(sinusoidal, 8)(jnp.arange(3)).shape
    (3, 8)
    """
    return bind(sinusoidal, depth=features) if position is sinusoidal else position


class Embedder(NamedTuple):
    """The vectors of tokens; and those of types, positions, a norm and a linear layer, or None."""

    token: Callable[[Array], Array]
    scale: float
    token_type: Any
    position: Any
    norm: Any
    projection: Any = None

    def __call__(self, tokens: Array, positions: Array | None, types: Array | None) -> Array:
        """Return norm(scale token + position + type), projected where it is: [B, T, D]."""
        checks.axes("Embedding", tokens=(tokens, "BT"))
        vectors = self.token(_as_indices(tokens))
        vectors = vectors * jnp.asarray(self.scale, vectors.dtype)
        if self.position is not None:
            at = indices(tokens.shape[1]) if positions is None else positions
            added = self.position(at).astype(vectors.dtype)
            vectors = vectors + jnp.broadcast_to(added, vectors.shape)
        if self.token_type is not None:
            types = jnp.zeros_like(tokens) if types is None else types
            checks.axes("Embedding", tokens=(tokens, "BT"), types=(types, "BT"))
            vectors = vectors + self.token_type(_as_indices(types))
        elif types is not None:
            raise ValueError(
                "Embedding: it was built without token types; give num_types, or leave out types."
            )
        vectors = vectors if self.norm is None else self.norm(vectors)
        return vectors if self.projection is None else self.projection(vectors)


def check_tokens(given: tuple[int, int], needed: tuple[int, int]) -> None:
    """Require tokens' vectors of an embedding's own sizes.

    Raises:
      ValueError: other sizes.
    """
    if given != needed:
        raise ValueError(
            f"Embedding: shared tokens must have (vocabulary, features) = {needed}, got {given}; "
            "give both embeddings the same sizes, or leave out what shares them."
        )


def check_tied(projection: Any) -> None:
    """Require that nothing lies between the tokens' vectors and the model.

    Raises:
      ValueError: a linear layer does.
    """
    if projection is not None:
        raise ValueError(
            "Embedding: with table_features a linear layer lies between its tokens' vectors and "
            "the model, and they give no logits; build the model with a head."
        )


def _as_indices(tokens: Array) -> Array:
    """Return integers as int32: those of a byte cannot index a longer table in JAX."""
    is_whole = jnp.issubdtype(tokens.dtype, jnp.integer)
    return tokens.astype(jnp.int32) if is_whole else tokens


def to_logits(
    x: Array, tied: Callable[[Array], Array], head: Any, scale: float, cap: float | None
) -> Array:
    """Return logits [..., vocabulary]: products with the tokens' vectors, or those of a head.

    They are multiplied by the scale. With a cap c they become c tanh(logits / c) (Gemma Team 2024,
    section 2).
    """
    logits = tied(x) if head is None else head(x)
    logits = logits if scale == 1.0 else logits * jnp.asarray(scale, logits.dtype)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def count_patches(image_size: tuple[int, int], patch_size: int) -> int:
    """Return how many squares an image is cut into.

    Raises:
      ShapeError: height or width is not a multiple of the size.

    >>> count_patches((8, 6), 2)
    12
    """
    rows, columns = (
        checks.multiple("patches", name, length, "the patch size", patch_size)
        for name, length in zip(("the height", "the width"), image_size, strict=True)
    )
    return rows * columns


def patches(images: Array, size: int) -> Array:
    """Cut images [B, height, width, C] into squares, row by row: [B, S, size size C].

    Raises:
      ShapeError: height or width is not a multiple of the size.

    Dosovitskiy et al. 2021 (ViT), section 3.1.

    >>> patches(jnp.zeros((2, 8, 6, 3)), 2).shape
    (2, 12, 12)
    """
    batch, height, width, channels = checks.axes("patches", images=(images, "BHWC")).values()
    count = count_patches((height, width), size)
    grid = images.reshape(batch, height // size, size, width // size, size, channels)
    return grid.swapaxes(2, 3).reshape(batch, count, size * size * channels)


def add_class_token(x: Array, class_token: Array, positions: Array) -> Array:
    """Put the class token [D] before patches [B, S, D], and add positions [1 + S, D].

    Raises:
      ShapeError: more or fewer patches than positions.

    Dosovitskiy et al. 2021 (ViT), equation 1.

    >>> add_class_token(jnp.zeros((2, 3, 5)), jnp.ones(5), jnp.zeros((4, 5))).shape
    (2, 4, 5)
    """
    first = jnp.broadcast_to(class_token.astype(x.dtype), (x.shape[0], 1, x.shape[2]))
    x = jnp.concatenate([first, x], axis=1)
    checks.axes("add_class_token", positions=(positions, "SD"), patches=(x, "BSD"))
    return x + jnp.broadcast_to(positions.astype(x.dtype), x.shape)

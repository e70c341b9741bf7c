"""The attention of a recurrent decoder, whichever of the two Flax APIs holds its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attention_jax.base import checks
from attention_jax.masks import MaskLike
from attention_jax.scores.prepared import PreparedMemory, attend_prepared, prepare

Array = jax.Array


class DecoderMethods:
    """The methods of `DecoderAttention` that the two APIs share."""

    state_features: int
    memory_features: int
    dtype: Any

    def _functions(self) -> tuple[Any, Any]:
        """Return score and normalizer with their parameters bound."""
        raise NotImplementedError

    def keys(self, memory: Array) -> PreparedMemory:
        """Prepare a source [B, S, memory_features], once for all the steps that attend to it."""
        checks.features("DecoderAttention", "memory", memory, self.memory_features)
        return prepare(self._functions()[0], memory)

    def __call__(
        self, state: Array, memory: Array | PreparedMemory, mask: MaskLike = None
    ) -> tuple[Array, Array]:
        """Attend to the source.

        Args:
          state: [B, state_features], or [B, T, state_features] for several at once.
          memory: [B, S, memory_features], or what `keys` made of it.
          mask: a mask, or a boolean array that broadcasts to the weights. True = may attend.

        Returns:
          Context [B, memory_features] and weights [B, S], or [B, T, ...] for several states;
          zeros for a state that may attend to nothing.

        Raises:
          ShapeError: state, memory and mask do not fit each other or the module.
        """
        score, normalizer = self._functions()
        checks.features("DecoderAttention", "state", state, self.state_features)
        source = memory if isinstance(memory, PreparedMemory) else self.keys(memory)
        context, weights = attend_prepared(score, state, source, mask, normalizer)
        return context.astype(self.dtype or state.dtype), weights


class GlobalMethods:
    """The methods of `GlobalAttention` that the two APIs share."""

    attention: Any
    combine: Callable[[Array], Array]

    def keys(self, memory: Array) -> PreparedMemory:
        """Prepare a source [B, S, memory_features], once for all the steps that attend to it."""
        return self.attention.keys(memory)

    def __call__(
        self, state: Array, memory: Array | PreparedMemory, mask: MaskLike = None
    ) -> tuple[Array, Array]:
        """Return the attentional vector [B, out_features] and the weights [B, S].

        Arguments, the axis T and errors are those of `DecoderAttention`.
        """
        context, weights = self.attention(state, memory, mask)
        return jnp.tanh(self.combine(jnp.concatenate([context, state], axis=-1))), weights


def check_features(state_features: int, memory_features: int) -> None:
    """Require features of the state and of the memory."""
    sizes = {"state_features": state_features, "memory_features": memory_features}
    checks.sizes("DecoderAttention", **sizes)


def vector_features(state_features: int, out_features: int | None) -> int:
    """Return the depth of the attentional vector, that of the state unless given."""
    checks.sizes("GlobalAttention", state_features=state_features)
    return checks.size_or(state_features, "GlobalAttention", out_features=out_features)

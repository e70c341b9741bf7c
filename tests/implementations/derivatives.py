"""Derivatives of gradients, for tests that compare them between implementations."""

import jax
import jax.numpy as jnp


def of_squares(gradients, *arguments):
    """Return (gradients, context) of `gradients(*arguments)`, and the gradients of their squares.

    Those are with respect to the first two arguments.
    """

    def squares(*arguments):
        found, context = gradients(*arguments)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(found)), (found, context)

    return jax.grad(squares, (0, 1), has_aux=True)(*arguments)

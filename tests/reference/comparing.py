"""Compare a published model with ours on the same random weights, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

torch = pytest.importorskip("torch")

DIFFERENCES: dict[str, float] = {}
"""The largest difference of values by the name of a recipe, for the table in the README."""


def tensor(x):
    return torch.from_numpy(np.array(x))


def drawn(model, seed=0):
    """Draw every parameter that learns at random, in float64."""
    generator = np.random.default_rng(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.copy_(tensor(0.3 * generator.standard_normal(tuple(parameter.shape))))
    return model


def loaded(model, tree):
    """Give our model its parameters: every one of them, in its shape."""
    own = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert own == jax.tree.map(jnp.shape, tree)
    nnx.update(model, nnx.State(jax.tree.map(jnp.asarray, tree)))
    return model


def close(name, ours, other, tolerance=1e-12):
    ours, other = np.asarray(ours), other.detach().numpy()
    assert ours.shape == other.shape
    assert ours.dtype == np.float64
    difference = np.abs(ours - other).max()
    assert difference < tolerance * max(1.0, np.abs(ours).max()), difference
    DIFFERENCES[name] = max(DIFFERENCES.get(name, 0.0), float(difference))


def agree(name, other, ours, parameters, run_other, run_ours):
    """Compare outputs, and the gradients of a random sum of them by every parameter.

    Args:
      name: of the recipe.
      other: a module of PyTorch.
      ours: a module of NNX, whose parameters become those of the other.
      parameters: a state dict of the other -> tree of ours.
      run_other: () -> output.
      run_ours: ours -> output.
    """
    loaded(ours, parameters(other.state_dict()))
    expected = run_other()
    weights = np.random.default_rng(0).standard_normal(expected.shape)
    torch.sum(expected * tensor(weights)).backward()

    @nnx.jit
    @nnx.value_and_grad(has_aux=True)
    def with_gradient(ours):
        output = run_ours(ours)
        return jnp.sum(output * weights), output

    (_, output), gradient = with_gradient(ours)
    close(name, output, expected)
    slopes = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in other.named_parameters(remove_duplicate=False)
    }
    jax.tree.map(_close_gradient, nnx.to_pure_dict(gradient), parameters(slopes, offset=0.0))


def _close_gradient(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)

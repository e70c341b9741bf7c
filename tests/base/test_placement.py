"""Whether a program is spread over devices: from meshes, or from where it is lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Var
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from attention_jax.base import placement

AUTO, EXPLICIT, MANUAL = AxisType.Auto, AxisType.Explicit, AxisType.Manual


def mesh_of(sizes, kinds):
    names = ("data", "heads")[: len(sizes)]
    return AbstractMesh(sizes, names, axis_types=kinds)


@pytest.mark.parametrize(
    ("sizes", "kinds", "spread"),
    [
        ((2,), (AUTO,), True),
        ((1,), (AUTO,), False),
        ((2,), (EXPLICIT,), False),
        ((2,), (MANUAL,), False),
        ((1, 4), (EXPLICIT, AUTO), True),
        ((4, 1), (EXPLICIT, AUTO), False),
    ],
)
def test_a_mesh_that_is_set_tells(sizes, kinds, spread):
    mesh = mesh_of(sizes, kinds)
    with jax.sharding.use_abstract_mesh(mesh):
        assert placement.known() is spread


def test_without_a_mesh_nothing_is_known_while_tracing():
    assert placement.known(jnp.ones(3), np.ones(2)) is None
    assert not placement.is_spread(jnp.ones(3))


def test_arrays_tell_their_mesh():
    seen = []

    def function(x):
        seen.append(placement.known(x))
        return x

    sharding = NamedSharding(mesh_of((2,), (AUTO,)), PartitionSpec("data"))
    jax.eval_shape(function, jax.ShapeDtypeStruct((4,), "float32", sharding=sharding))
    assert seen == [True]


def lowered(number):
    """Lower a condition for so many devices, of which no more than the compiler needs to know."""
    mesh = mesh_of((number,), (AUTO,))
    function = lambda x: jnp.where(placement.is_spread(x), x, -x)  # noqa: E731
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    traced = jax.jit(function, in_shardings=sharding).trace(jax.ShapeDtypeStruct((8,), "float32"))
    return traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(("number", "constant"), [(1, "false"), (2, "true")])
def test_the_lowering_tells(number, constant):
    assert re.findall(r"dense<(true|false)>", lowered(number)) == [constant]


@pytest.mark.parametrize(
    ("platform", "cpu", "tpu"), [("cpu", "true", "false"), ("tpu", "false", "true")]
)
def test_the_lowering_tells_the_platform(platform, cpu, tpu):
    both = lambda x: (placement.is_on_cpu(x), placement.is_on_tpu(x))  # noqa: E731
    text = jax.jit(both).trace(1.0).lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"dense<(true|false)>", text) == [cpu, tpu]


def test_a_context_that_is_not_known_counts_as_spread():
    class Other:
        """Neither number of devices nor mesh."""

    assert placement.spreads(Other())


def test_the_condition_can_be_mapped_and_derived():
    function = lambda x: jnp.where(placement.is_spread(x), 0.0, x)  # noqa: E731
    assert np.array_equal(jax.vmap(jax.grad(function))(jnp.arange(3.0)), np.ones(3))


@pytest.mark.parametrize(
    ("platforms", "answers"),
    [(("cpu",), [True, False]), (("gpu",), [False, False]), (("gpu", "tpu"), [False, None])],
)
def test_what_is_traced_for_some_platforms_has_only_the_answers_that_are_left(platforms, answers):
    with placement.lowered_for(platforms):
        jaxpr = jax.make_jaxpr(lambda x: [placement.is_on_cpu(x), placement.is_on_tpu(x)])(1.0)
    asked = [x if isinstance(x, Var) else None for x in jaxpr.jaxpr.outvars]
    known = [bool(x.val) for x, a in zip(jaxpr.jaxpr.outvars, asked, strict=True) if a is None]
    assert known == [x for x in answers if x is not None]
    assert placement.possible() == placement.PLATFORMS


@pytest.mark.parametrize("platforms", [("cpu",), ("gpu", "tpu"), placement.PLATFORMS])
def test_a_function_for_other_platforms_is_not_traced(platforms):
    traced = []

    def noted(name, x):
        traced.append(name)
        return x

    with placement.lowered_for(platforms):
        ways = (functools.partial(noted, name) for name in ("cpu", "default"))
        jax.make_jaxpr(functools.partial(placement.on_cpu_or_not, *ways))(1.0)
    expected = {("cpu",): {"cpu"}, ("gpu", "tpu"): {"default"}}
    assert set(traced) == expected.get(platforms, {"cpu", "default"})

"""The pairing behind additive attention, without the array of every query, key and feature."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from attention_jax.base import checks, placement

TOGETHER = 16
"""How many features are added within one kernel, where the platform is no CPU."""

_product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def tanh_pairs(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Pair every query with every key by a weighted sum of tanh, as additive attention does.

    scores[t, s] = Σ_a value[a] tanh(query[t, a] + key[s, a])

    With r = 1 / (1 + exp(2q) exp(2k)), tanh(q + k) = 1 - 2r and its derivative is 4r (1 - r):
    the exponentials belong to one token each, and a pair costs one division per feature. Nothing
    of size T x S x A is held: not forward, not in the tangent, not in the reverse pass.

    Args:
      query: projected queries, [T, A].
      key: projected keys, [S, A].
      value: the weight of each feature, [A].

    Returns:
      [T, S], in float64 if an input is, else in float32; exact for inputs of any size.

    Raises:
      ShapeError: the three disagree on the features, or have other axes.

    Bahdanau, Cho and Bengio 2015, appendix A.1.2, with query = W s, key = U h and value = v.

    >>> query, key = jnp.array([[0.0, 1.0]]), jnp.array([[0.0, -1.0], [jnp.inf, 1000.0]])
    >>> tanh_pairs(query, key, value=jnp.array([1.0, 2.0]))
    Array([[0., 3.]], dtype=float32)
    """
    query, key, value = _at_least_single("tanh_pairs", query, key, value)
    if 1 in (query.shape[0], key.shape[0]):
        return _one_row(jnp.tanh, query, key, value)
    return _tanh_pairs(placement.possible(), query, key, value)


def activation_pairs(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Pair every query with every key by a weighted sum of an elementwise activation.

    scores[t, s] = Σ_a value[a] activation(query[t, a] + key[s, a])

    Shapes, precision, memory and errors are those of `tanh_pairs`; the derivatives are those
    that JAX has for the activation.

    >>> query, key = jnp.array([[1.0, 2.0]]), jnp.array([[-3.0, 1.0]])
    >>> activation_pairs(query, key, jnp.array([1.0, 10.0]), jax.nn.relu)
    Array([[30.]], dtype=float32)
    """
    query, key, value = _at_least_single("activation_pairs", query, key, value)
    if 1 in (query.shape[0], key.shape[0]):
        return _one_row(activation, query, key, value)
    return _sum_over_features(lambda q, k, v: v * activation(q + k), (query,), (key,), (value,))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _tanh_pairs(platforms, query, key, value):
    """Add the pairs up; the derivative is traced later, and for the same platforms."""

    def pairs(form, query, key, value):
        return _sum_over_features(
            lambda q, k, v: v * form.tanh(form.of_pair(q, k)),
            (query,),
            (key,),
            (value,),
        )

    with placement.lowered_for(platforms):
        return _in_a_form(pairs, query, key, value)


@_tanh_pairs.defjvp
def _tanh_pairs_jvp(platforms, primals, tangents):
    """Σ_a value (1 - tanh²) (dquery + dkey) + tanh dvalue, which JAX can also transpose."""

    def tangents_of_pairs(form, query, key, value, dquery, dkey, dvalue):
        def term(q, dq, k, dk, dv):
            x = form.of_pair(q, k)
            return form.slope(x) * (dq + dk) + dv * x

        # Factors of one token leave the sum over pairs, as a compiler may not do by itself.
        dquery, dkey = (form.gain * value[None, :] * change for change in (dquery, dkey))
        weights = (form.scale * dvalue,)
        pairs = _sum_over_features(term, (query, dquery), (key, dkey), weights)
        return form.offset * jnp.sum(dvalue) + pairs

    with placement.lowered_for(platforms):
        change = _in_a_form(tangents_of_pairs, *primals, *tangents)
    return _tanh_pairs(platforms, *primals), change


class _Form(NamedTuple):
    """How a pair gives x; tanh(x) is offset + scale x, and its derivative gain slope(x)."""

    of_pair: Callable[[jax.Array, jax.Array], jax.Array]
    tanh: Callable[[jax.Array], jax.Array]
    offset: float
    scale: float
    slope: Callable[[jax.Array], jax.Array]
    gain: float


_BY_EXPONENTIALS = _Form(
    of_pair=lambda exp_q, exp_k: 1 / (1 + exp_q * exp_k),
    tanh=lambda r: 1 - 2 * r,
    offset=1.0,
    scale=-2.0,
    slope=lambda r: r * (1 - r),
    gain=4.0,
)
_BY_TANH = _Form(
    of_pair=lambda q, k: jnp.tanh(q + k),
    tanh=lambda t: t,
    offset=0.0,
    scale=1.0,
    slope=lambda t: 1 - t * t,
    gain=1.0,
)


def _in_a_form(pairs, query, key, *rest):
    """Call `pairs(form, query, key, *rest)`: by exponentials if exact, else by tanh.

    The exponentials are those of queries q and keys k clipped to ±cap. They are exact if, of
    every feature, all the queries or all the keys stay within ±reach (11 in float32, 115 in
    float64). Say |q| <= reach; then

    * clipping changes no tanh: it acts only on |k| > cap, where |q + k| >= cap - reach = margin
      before and after, and 1 - tanh(margin) <= eps / 4 is lost in rounding;
    * p = exp(2q) exp(2k) is at most max^0.7 and at least its inverse, so that neither p nor its
      products with moderate tangents overflow, also in the second derivative;
    * a relative error of δ in p changes 1 - 2 / (1 + p) by 2δ p / (1 + p)² <= δ / 2, and δ is
      but a few eps, since 2q and 2k are exact.
    """
    finfo = jnp.finfo(query.dtype)
    margin = math.log(8 / finfo.eps) / 2
    cap, reach = ((0.35 * math.log(finfo.max) + sign * margin) / 2 for sign in (1, -1))

    def by_exponentials(query, key, *rest):
        query, key = (jnp.exp(2 * jnp.clip(tokens, -cap, cap)) for tokens in (query, key))
        return pairs(_BY_EXPONENTIALS, query, key, *rest)

    def by_tanh(query, key, *rest):
        return pairs(_BY_TANH, query, key, *rest)

    def largest(tokens):
        return jnp.max(jnp.abs(tokens), axis=0, initial=0)

    # NaN fails the comparison, and so goes to tanh and stays in its row or column.
    exact = jnp.all(jnp.minimum(largest(query), largest(key)) <= reach)
    exact = exact & ~placement.is_on_tpu(query)  # which has a unit for tanh
    return lax.cond(_in_every_example(exact), by_exponentials, by_tanh, query, key, *rest)


@custom_vmap
def _in_every_example(flag):
    """The flag, reduced over mapped axes: a batched predicate makes cond compute both branches.

    False for a batch that may be spread over devices, which would have to ask each other.
    """
    return flag


@_in_every_example.def_vmap
def _(axis_size, in_batched, flags):
    flag = jnp.all(flags)
    if not isinstance(axis_size, int) or axis_size > 1:  # or a symbol of `jax.export`
        flag = flag & ~placement.is_spread(flags)
    return _in_every_example(flag), False


def _sum_over_features(term, queries, keys, weights):
    """Σ_a term(queries [T, 1] of feature a, keys [1, S] of it, weights [] of it).

    A CPU adds one feature at a time to pairs that stay in its cache. Elsewhere many features are
    added within one kernel, and the pairs go through memory once for all of them.
    """
    one_by_one = functools.partial(_scanned, term, 1)
    together = functools.partial(_scanned, term, TOGETHER)
    return placement.on_cpu_or_not(one_by_one, together, queries, keys, weights)


def _scanned(term, unroll, queries, keys, weights):
    # Rematerialised, so that the reverse pass keeps the inputs and not every pair and feature.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def add(total, feature):
        queries, keys, weights = feature
        return total + term(*(q[:, None] for q in queries), *(k[None, :] for k in keys), *weights)

    # Zeros like a product of all three, so that under shard_map they vary as the inputs do.
    total = jnp.zeros_like(_product(queries[0] * weights[0][None, :], keys[0].T))
    if not weights[0].size:
        return total
    features = jax.tree.map(jnp.transpose, (queries, keys, weights))
    unroll = -(-weights[0].size // -(-weights[0].size // unroll))  # in turns of equal size
    total, _ = lax.scan(
        lambda total, feature: (add(total, feature), None), total, features, unroll=unroll
    )
    return total


def _one_row(activation, query, key, value):
    """The plain formula, for a step of a decoder: one query has no more pairs than inputs."""
    return _product(activation(query + key), value).reshape(query.shape[0], key.shape[0])


def _at_least_single(operation, query, key, value):
    checks.axes(operation, query=(query, "TA"), key=(key, "SA"), value=(value, "A"))
    double = jnp.float64 in (query.dtype, key.dtype, value.dtype)
    dtype = jnp.float64 if double else jnp.float32
    return query.astype(dtype), key.astype(dtype), value.astype(dtype)

"""Scores that are small networks: additive attention and its relatives, with their rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from attention_jax.base import checks
from attention_jax.base.binding import as_pytree, bind, rule, taken_apart
from attention_jax.scores.composition import (
    Separated,
    finished,
    identity,
    project_rows,
    separate,
    unit_rows,
)
from attention_jax.scores.formulas import dot
from attention_jax.scores.sines import TanhBySines
from attention_jax.scores.tanh_pairs import activation_pairs, tanh_pairs

Array = jax.Array


def additive(
    query: Array,
    key: Array,
    query_weight: Array,
    key_weight: Array,
    value: Array,
    bias: Array,
    activation: Callable[[Array], Array] | None = jnp.tanh,
    after_sum: Callable[[Array], Array] | None = None,
) -> Array:
    r"""Additive: e_ij = g(v^T f(W_q q_i + W_k k_j + b)), f = tanh and g the identity by default.

    The pairing never holds T x S x A numbers, and W_q q and W_k k are computed once per row.
    Graph attention is the same function under a mask of edges: GATv2 has f leaky ReLU, GAT has
    it after the sum, as g, with f the identity.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      query_weight: W_q, [Hq, A].
      key_weight: W_k, [Hk, A].
      value: v, [A].
      bias: b, [A].
      activation: f, elementwise, before the sum over features; None leaves them as they are.
        `TanhBySines` approximates tanh, by products of matrices alone.
      after_sum: g, elementwise, after it; None leaves the sum as it is.

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: a parameter does not fit.

    Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2; Velickovic et al. 2018, section
    2.1 (GAT); Brody, Alon and Yahav 2022, section 3 (GATv2).

    >>> one = jnp.ones((1, 1))
    >>> e = additive(one, one, one, one, value=2.0 * jnp.ones(1), bias=-2.0 * jnp.ones(1))
    >>> e + 0.0
    Array([[0.]], dtype=float32)
    """
    checks.axes(
        "additive",
        query=(query, "TQ"),
        key=(key, "SH"),
        query_weight=(query_weight, "QA"),
        key_weight=(key_weight, "HA"),
        value=(value, "A"),
        bias=(bias, "A"),
    )
    parts = _separate_additive(query_weight, key_weight, value, bias, activation, after_sum)
    return parts(query, key)


def normalized_additive(
    query: Array,
    key: Array,
    query_weight: Array,
    key_weight: Array,
    value: Array,
    bias: Array,
    gain: Any,
    offset: Any,
) -> Array:
    r"""Weight-normalised additive: e_ij = g v^T tanh(W_q q_i + W_k k_j + b) / |v| + r.

    The gain g, not the length of v, sets the range of the logits; with r < 0 and the sigmoid
    normalizer attention starts out sparse.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      query_weight: W_q, [Hq, A].
      key_weight: W_k, [Hk, A].
      value: v, [A].
      bias: b, [A].
      gain: g, a scalar.
      offset: r, a scalar.

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: a parameter does not fit.

    Raffel et al. 2017, section 2.4 ("modified energy function").

    >>> one = jnp.ones((1, 1))
    >>> v = jnp.array([7.0])
    >>> normalized_additive(one, one, 50 * one, one, v, jnp.zeros(1), gain=3.0, offset=-1.0)
    Array([[2.]], dtype=float32)
    """
    parts = _separate_normalized(query_weight, key_weight, value, bias, gain, offset)
    additive(query, key, query_weight, key_weight, value, bias)  # its checks
    return parts(query, key)


def concat(
    query: Array,
    key: Array,
    weights: Sequence[Array],
    biases: Sequence[Array],
    value: Array,
    activation: Callable[[Array], Array] = jnp.tanh,
) -> Array:
    r"""Multi-layer score: e_ij = v^T f(W_n ... f(W_1 [q_i; k_j] + b_1) ... + b_n).

    With one layer W_1 splits into a query and a key half and this is `additive`.

    Args:
      query: [T, Hq].
      key: [S, Hk].
      weights: W_1 [Hq + Hk, A_1], W_2 [A_1, A_2], ...; at least one.
      biases: b_1 [A_1], b_2 [A_2], ...
      value: v, [A_n].
      activation: elementwise f.

    Returns:
      Logits [T, S].

    Raises:
      ShapeError: W_1 does not fit the concatenation, a layer not the one below it, or no layer
        is given.

    Luong, Pham and Manning 2015, equation 8 ("concat").

    >>> from attention_jax import bind
    >>> score = bind(concat, weights=[jnp.ones((2, 1))], biases=[jnp.zeros(1)], value=jnp.ones(1))
    >>> score(jnp.array([[1.0]]), jnp.array([[-1.0]]))
    Array([[0.]], dtype=float32)
    """
    if not weights or len(weights) != len(biases):
        raise checks.ShapeError(
            "concat: give one bias for every weight and at least one layer, got "
            f"{len(weights)} weights and {len(biases)} biases."
        )
    sizes = checks.axes("concat", query=(query, "TQ"), key=(key, "SH"), weight=(weights[0], "CA"))
    if sizes["C"] != sizes["Q"] + sizes["H"]:
        raise checks.ShapeError(
            f"concat: axis 0 of weights[0] must be Hq + Hk = {sizes['Q']} + {sizes['H']}, got "
            f"{sizes['C']}."
        )
    layers_above = [(f"weights[{n}]", (w, "AB")) for n, w in enumerate(weights)][1:]
    for n, (name, above) in enumerate([*layers_above, ("value", (value, "A"))]):
        layer = {f"weights[{n}]": (weights[n], "CA"), f"biases[{n}]": (biases[n], "A")}
        checks.axes("concat", **layer, **{name: above})
    return _separate_concat(weights, biases, value, activation)(query, key)


@rule(additive, "separation")
def _separate_additive(
    query_weight: Array,
    key_weight: Array,
    value: Array,
    bias: Array,
    activation: Any = jnp.tanh,
    after_sum: Any = None,
) -> Separated:
    last = identity if after_sum is None else as_pytree(after_sum)
    if isinstance(activation, TanhBySines):
        sines = {"sines": activation}
        of_query = bind(_sines_of_queries, weight=query_weight, value=value, **sines)
        of_key = bind(_sines_of_keys, weight=key_weight, bias=bias, **sines)
        return Separated(of_query, of_key, separate(dot).pairs, last)
    if activation is None:  # v^T W_q q_i + v^T (W_k k_j + b), a number for each row
        query_weight, key_weight = query_weight @ value[:, None], key_weight @ value[:, None]
        pairs, bias = bind(_sums), (bias @ value)[None]
    else:
        pairs = _additive_pairs(value, activation)
    return Separated(
        bind(project_rows, weight=query_weight),
        bind(project_rows, weight=key_weight, bias=bias),
        pairs,
        last,
    )


@rule(normalized_additive, "separation")
def _separate_normalized(
    query_weight: Array, key_weight: Array, value: Array, bias: Array, gain: Any, offset: Any
) -> Separated:
    direction = unit_rows(value[None, :])[0]
    parts = _separate_additive(query_weight, key_weight, direction, bias)
    return finished(parts, bind(_affine, gain=gain, offset=offset))


@rule(concat, "separation")
def _separate_concat(
    weights: Sequence[Array],
    biases: Sequence[Array],
    value: Array,
    activation: Any = jnp.tanh,
) -> Separated:
    return Separated(
        bind(_project_upper, weight=weights[0]),
        bind(_project_lower, weight=weights[0], bias=biases[0]),
        _additive_pairs(value, activation)
        if len(weights) == 1
        else bind(
            _deep_pairs,
            weights=list(weights[1:]),
            biases=list(biases[1:]),
            value=value,
            activation=as_pytree(activation),
        ),
        identity,
    )


def _sines_of_queries(query: Array, weight: Array, value: Array, sines: TanhBySines) -> Array:
    return sines.of_queries(project_rows(query, weight), value)


def _sines_of_keys(key: Array, weight: Array, bias: Array, sines: TanhBySines) -> Array:
    return sines.of_keys(project_rows(key, weight, bias))


def _sums(query: Array, key: Array) -> Array:
    return query + key.T


def _affine(logits: Array, gain: Any, offset: Any) -> Array:
    return jnp.asarray(gain, logits.dtype) * logits + jnp.asarray(offset, logits.dtype)


def _additive_pairs(value: Array, activation: Any) -> Partial:
    if _is_tanh(activation):
        return bind(tanh_pairs, value=value)
    return bind(activation_pairs, value=value, activation=as_pytree(activation))


def _is_tanh(activation: Any) -> bool:
    return taken_apart(activation)[0] in (jnp.tanh, jax.nn.tanh, jax.lax.tanh)


def _deep_pairs(
    query: Array,
    key: Array,
    weights: Sequence[Array],
    biases: Sequence[Array],
    value: Array,
    activation: Any,
) -> Array:
    """Run the layers above the first, one query row at a time: S x A numbers, not T x S x A."""
    of_row = functools.partial(
        _logits_of_row, key=key, layers=(weights, biases), value=value, activation=activation
    )
    return jax.lax.map(jax.checkpoint(of_row), query)


def _logits_of_row(
    row: Array,
    key: Array,
    layers: tuple[Sequence[Array], Sequence[Array]],
    value: Array,
    activation: Any,
) -> Array:
    hidden = activation(row[None, :] + key)
    for weight, bias in zip(*layers, strict=True):
        hidden = activation(hidden @ weight + bias[None, :])
    return hidden @ value


def _project_upper(query: Array, weight: Array) -> Array:
    return query @ weight[: query.shape[-1]]


def _project_lower(key: Array, weight: Array, bias: Array) -> Array:
    return key @ weight[weight.shape[0] - key.shape[-1] :] + bias[None, :]

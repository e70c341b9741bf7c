"""Integers of every dtype are int32 where they are indices, whatever argument takes them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, cache, masks, positions
from attention_jax.base.integers import as_int32
from attention_jax.interop import dot_product_attention

ALL = ["uint8", "int8", "int16", "uint16", "uint32", "int64", "uint64"]
SHORT = ["uint8", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("int16", "uint32"))]
Q_IDX, KV_IDX = np.array([[0], [3], [100]]), np.array([[5, 1, 7, 126]])
MASKS = {
    "lengths": lambda given: masks.Lengths(given(3), given(5)),
    "prefix": lambda given: masks.Prefix(given(3)),
    "segment": lambda given: masks.Segment(given([0, 0, 1, 1, 2, 2])),
    "segments": lambda given: masks.Segment(given([0, 0, 1, 1, 2, 2]), given([2, 2, 1, 1, 0, 0])),
    "causal": lambda given: masks.Causal(given(2)),
    "window": lambda given: masks.Window(given(2), given(1)),
    "shift": lambda given: masks.Shift(masks.Causal(), query=given(2), key=given(1)),
    "global": lambda given: masks.GlobalTokens(given([1, 0, 0, 1, 0, 0])),
    "dilated": lambda given: masks.Dilated(given(1), given(1), given(2)),
    "strided": lambda given: masks.Strided(given(2)),
    "fixed": lambda given: masks.Fixed(given(3), given(1)),
    "chunked": lambda given: masks.Chunked(given(2), given(1), given(0)),
    "block": lambda given: masks.Block(masks.Causal(), given(2)),
    "grid": lambda given: masks.GridWindow(given(2), given(3), given(2), given(1)),
    "edges": lambda given: masks.edges(given([[0, 1], [1, 2], [2, 3]]), 6),
    "neighbors": lambda given: masks.Edges(given(6 * [[0, 1]])),
    "random": lambda given: masks.random_blocks(jax.random.key(0), *map(given, (6, 2, 1))),
    "bigbird": lambda given: masks.bigbird(jax.random.key(0), *map(given, (8, 1, 1, 1, 1))),
    "longformer": lambda given: masks.longformer(given(2), given(1), given(2)),
}
TABLE = jnp.arange(32.0)
POSITIONS = {
    "alibi": lambda given: positions.alibi(given(Q_IDX), given(KV_IDX), jnp.float32(0.5)),
    "t5_bucket": lambda given: positions.t5_bucket(given([0, 3, 7, 120]), bidirectional=False),
    "t5_bias": lambda given: positions.t5_bias(given(Q_IDX), given(KV_IDX), TABLE),
    "grid_bias": lambda given: positions.grid_bias(
        given(Q_IDX), given(KV_IDX), TABLE[:9].reshape(3, 3), width=given(2)
    ),
    "relative_key": lambda given: positions.relative_key(
        jnp.ones((3, 4)),
        jnp.ones((4, 4)),
        TABLE[:20].reshape(5, 4),
        q_idx=given(Q_IDX[:, 0]),
        kv_idx=given(KV_IDX[0]),
    ),
    "relative_values": lambda given: positions.relative_values(
        jnp.ones((3, 4)), given(Q_IDX[:, 0]), given(KV_IDX[0]), TABLE[:20].reshape(5, 4)
    ),
    "sinusoidal": lambda given: positions.sinusoidal(given(Q_IDX), 4),
    "sinusoidal_step": lambda given: positions.sinusoidal_step(given(2), 4),
    "embedded": lambda given: positions.embedded(given([100, 3]), jnp.ones((300, 4)).cumsum(0)),
    "rotary": lambda given: positions.rotary(jnp.ones((3, 4)), given(Q_IDX[:, 0])),
    "extend": lambda given: (
        cache.extend(
            cache.init(3, 8, 1, 1, ragged=True), *2 * [jnp.ones((3, 3, 1, 1))], given([1, 2, 3])
        )[0].positions
    ),
}


QUICK = {"lengths", "prefix", "causal", "window", "shift"}


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MASKS],
)
def test_a_mask_takes_integers_of_any_dtype(name, dtype):
    def draw(given):
        mask = MASKS[name](given)
        return mask.to_dense(6), mask.tiles(6, 6, 2, 3)

    expected = draw(lambda value: np.asarray(value) if np.ndim(value) else value)
    for of in (np.asarray, jnp.asarray):
        found = draw(lambda value, of=of: of(np.asarray(value, dtype)))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", POSITIONS)
def test_positions_and_counts_are_integers_of_any_dtype(name, dtype):
    expected = POSITIONS[name](lambda value: jnp.asarray(np.asarray(value, np.int32)))
    for of in (np.asarray, jnp.asarray):
        found = POSITIONS[name](lambda value, of=of: of(np.asarray(value, dtype)))
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", SHORT)
def test_attend_takes_lengths_of_any_dtype_for_each_example(dtype, implementation):
    x = jax.random.normal(jax.random.key(0), (2, 6, 1, 4))
    mask = masks.Lengths([3, 5]) & (masks.Prefix([1, 2]) | masks.Causal(1))
    given = masks.Lengths(jnp.asarray([3, 5], dtype)) & (
        masks.Prefix(np.asarray([1, 2], dtype)) | masks.Causal(np.asarray(1, dtype))
    )
    found = jax.jit(lambda given: attend(x, x, x, mask=given, **implementation))(given)
    np.testing.assert_allclose(found, attend(x, x, x, mask=mask), atol=1e-6)


@pytest.mark.parametrize("dtype", SHORT)
def test_the_drop_in_takes_lengths_of_any_dtype(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 6, 1, 4))
    lengths = np.array([3, 5])
    found, expected = (
        dot_product_attention(
            x, x, x, query_seq_lengths=given, key_value_seq_lengths=given, local_window_size=2
        )
        for given in (jnp.asarray(lengths, dtype), jnp.asarray(lengths, jnp.int32))
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", SHORT)
def test_a_bias_may_return_integers_of_any_dtype(dtype, implementation):
    x = jax.random.normal(jax.random.key(0), (1, 6, 1, 4))
    found, expected = (
        attend(x, x, x, bias=lambda q_idx, kv_idx, to=to: (q_idx + kv_idx).astype(to))
        for to in (jax.dtypes.canonicalize_dtype(dtype), jnp.float32)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_number_beyond_int32_is_refused_where_it_is_known():
    message = r"Prefix.length must hold numbers that fit int32, got 4294967295"
    with pytest.raises(ValueError, match=message):
        masks.Prefix(np.uint32(2**32 - 1))


def test_a_length_beyond_int32_stands_for_all_and_a_name_stays_itself():
    largest = jnp.array([2**32 - 1], jnp.uint32)
    assert masks.Prefix(largest[0]).to_dense(2).all()
    names = jnp.concatenate([largest, largest >> 1])
    np.testing.assert_array_equal(masks.Segment(names).to_dense(2), np.eye(2, dtype=bool))


def test_a_mask_of_ones_own_that_checks_its_fields_gets_int32_too():
    @dataclasses.dataclass(frozen=True)
    class Before(masks.Mask):
        end: jax.Array

        def __post_init__(self):
            assert self.end.ndim == 0

        def __call__(self, q_idx, kv_idx):
            return kv_idx < self.end

    assert Before(jnp.uint8(2)).to_dense(3).sum() == 6


@pytest.mark.parametrize("dtype", ALL)
def test_every_dtype_becomes_int32(dtype):
    for of in (np.asarray, jnp.asarray):
        found = as_int32("f", of(np.asarray([3, 5], dtype)))
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, [3, 5])


def test_what_is_no_integer_stays_as_it_is():
    for value in (None, 3, 2.5, np.float32(1), np.bool_(True), jax.random.key(0)):
        assert as_int32("f", value) is value

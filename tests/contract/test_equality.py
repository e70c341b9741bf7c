"""Equal arguments make equal objects, which as static arguments of `jit` trace once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, per_head, positions, scores
from attention_jax.base.binding import taken_apart
from attention_jax.base.parameters import Parameter, learned
from attention_jax.linear import feature_maps, performer
from attention_jax.normalizers import streaming
from tests.contract import examples

HEADS, DEPTH = 2, 4


def of_mask(name):
    return lambda: masks.as_mask(examples.mask_example(name, 2, HEADS, 5, 7).mask)


def of_score(name):
    rng = lambda: np.random.default_rng(3)  # noqa: E731
    return lambda: examples.score_example(name, lambda *shape: rng().normal(size=shape)).score


def of_normalizer(name):
    function, _, parameters = taken_apart(examples.NORMALIZERS[name].normalizer)
    return lambda: bind(function, **parameters)


def shared_function(q_idx, kv_idx):
    return q_idx >= kv_idx


MASKS = {name: of_mask(name) for name in examples.MASKS if name != "Predicate"} | {
    "Predicate": lambda: masks.Predicate(shared_function),
    "as_mask of an array": lambda: masks.as_mask(np.eye(3, dtype=bool)),
    "as_mask of a function": lambda: masks.as_mask(shared_function),
    "and": lambda: masks.Causal() & masks.Window(3, 0),
    "or": lambda: masks.Causal(2) | masks.Prefix(np.array([1, 2])),
    "not": lambda: ~masks.Lengths(jnp.array([1, 2])),
    "longformer of heads": lambda: masks.longformer(2, 1, dilation=[1, 2]) & masks.Causal(),
    "swin": lambda: masks.swin(4, 4, 2, shifted=True),
    "one head": lambda: masks.Heads([masks.Causal(), masks.Full()]).of(head=1),
    "packed": lambda: masks.Segment(jnp.array([[0, 0, 1]]), np.array([[0, 1, 1]])),
    "block": lambda: masks.Block(masks.Heads([masks.Causal(), masks.Full()]), 2),
}
SCORES = {name: of_score(name) for name in examples.SCORES if name != "separate"} | {
    "separate": lambda: scores.separate(scores.cosine),
    "location": lambda: bind(scores.location, weight=np.ones((DEPTH, 9))),
    "relative_key": lambda: bind(positions.relative_key, table=np.ones((5, DEPTH))),
    "per_head": lambda: per_head(bind(scores.bilinear, weight=np.ones((HEADS, DEPTH, DEPTH)))),
    "composed": lambda: scores.soft_capped(
        scores.scaled(scores.row_normalized(bind(scores.cosine, temperature=0.3)), 0.5), 20
    ),
    "learned": lambda: learned(scores.dot, weight=Parameter((3,), jax.nn.initializers.ones)),
}
NORMALIZERS = (
    {name: of_normalizer(name) for name in examples.NORMALIZERS}
    | {
        f"streaming of {name}": lambda example=name: streaming(of_normalizer(example)())
        for name in examples.NORMALIZERS
    }
    | {
        "contextual_positions": lambda: bind(
            normalizers.contextual_positions, table=np.ones((3, DEPTH))
        ),
        "sink per head": lambda: per_head(
            bind(normalizers.softmax_with_sink, sink=jnp.ones(HEADS))
        ),
        "streaming with a sink": lambda: streaming(
            bind(normalizers.softmax_with_sink, sink=jnp.ones(HEADS))
        ),
    }
)
BIASES = {
    "alibi": lambda: bind(positions.alibi, slope=0.5),
    "alibi_bias": lambda: positions.alibi_bias(4),
    "t5_bias": lambda: bind(positions.t5_bias, table=jnp.ones(32), max_distance=64),
    "grid_bias": lambda: bind(positions.grid_bias, table=np.ones((3, 3)), width=4),
    "learned_buckets": lambda: positions.learned_buckets(16),
    "learned_grid": lambda: positions.learned_grid((3, 3), width=5),
    "learned_table": lambda: positions.learned_table(8, 4),
    "rotary": lambda: bind(positions.rotary, base=500.0, halves=True),
}
FEATURE_MAPS = {
    "relu": lambda: bind(feature_maps.relu, epsilon=0.1),
    "hedgehog": lambda: bind(feature_maps.hedgehog, weight=np.eye(3), bias=np.zeros(3)),
    "performer": lambda: bind(
        performer.positive,
        projection=performer.random_features(jax.random.key(0), 6, DEPTH, orthogonal=False),
    ),
}
MAKERS = [
    pytest.param(make, id=f"{kind}-{name}")
    for kind, makers in {
        "mask": MASKS,
        "score": SCORES,
        "normalizer": NORMALIZERS,
        "bias": BIASES,
        "feature map": FEATURE_MAPS,
    }.items()
    for name, make in makers.items()
]


@pytest.mark.parametrize("make", MAKERS)
def test_equal_arguments_make_what_is_equal_and_traces_once(make):
    first, second = make(), make()
    assert first == second and hash(first) == hash(second)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    traces = []

    def traced(static, x):
        traces.append(static)
        return x

    compiled = jax.jit(traced, static_argnums=0)
    for static in (first, second, make()):
        compiled(static, 1.0)
    assert len(traces) == 1


DIFFERENT = {
    "offset": (masks.Causal(), masks.Causal(1)),
    "class": (masks.Causal(), masks.Full()),
    "order": (masks.Causal() & masks.Full(), masks.Full() & masks.Causal()),
    "contents": (masks.Prefix(np.array([1, 2])), masks.Prefix(np.array([1, 3]))),
    "dtype": tuple(
        bind(normalizers.softmax_with_sink, sink=np.zeros((), dtype))
        for dtype in (np.float32, np.float16)
    ),
    "shape": (masks.Prefix(np.array([1])), masks.Prefix(np.array([[1]]))),
    "function": (masks.Predicate(lambda i, j: i == j), masks.Predicate(lambda i, j: i == j)),
    "heads": (masks.Heads([masks.Causal()] * 2), masks.Heads([masks.Causal(), masks.Full()])),
    "seed": tuple(masks.bigbird(jax.random.key(n), 16, size=1) for n in (0, 1)),
    "scale": (scores.scaled(scores.dot, 0.5), scores.scaled(scores.dot, 0.25)),
    "composition": (scores.scaled(scores.dot, 2.0), scores.soft_capped(scores.dot, 2.0)),
    "score": (scores.scaled(scores.dot, 2.0), scores.scaled(scores.cosine, 2.0)),
    "flag and number": (bind(sorted, reverse=True), bind(sorted, reverse=1)),
    "per head": tuple(
        per_head(bind(normalizers.softmax_with_sink, sink=x)) for x in (np.zeros(2), np.ones(2))
    ),
    "slopes": (positions.alibi_bias(4), positions.alibi_bias(8)),
    "buckets": (positions.learned_buckets(16), positions.learned_buckets(32)),
    "other object": (masks.Causal(), "Causal()"),
}


@pytest.mark.parametrize(("first", "second"), DIFFERENT.values(), ids=DIFFERENT)
def test_different_arguments_make_what_differs(first, second):
    assert first != second


def test_arrays_compare_by_value_wherever_they_are():
    assert masks.Prefix(np.array([1], np.int32)) == masks.Prefix(jnp.array([1], jnp.int32))
    not_a_number = np.array([np.nan, 1.0])
    assert bind(scores.cosine, temperature=not_a_number) == bind(
        scores.cosine, temperature=not_a_number.copy()
    )
    keys = [bind(jax.random.bits, key=jax.random.key(seed)) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    "make",
    [
        masks.Prefix,
        lambda x: masks.Causal() & masks.Prefix(x),
        lambda x: scores.scaled(scores.dot, x),
        lambda x: per_head(bind(normalizers.softmax_with_sink, sink=x)),
    ],
)
def test_what_only_jit_knows_equals_itself_alone(make):
    @jax.jit
    def compare(x, y):
        first = make(x)
        assert first == first and first == make(x) and first != make(y)
        assert hash(first) == hash(make(x))
        return x

    compare(1, 1)


def test_a_mask_given_as_static_argument_of_jit_compiles_once():
    traces = []

    def attended(x, mask, score):
        traces.append(mask)
        return attend(x, x, x, mask=mask, score=score)

    compiled = jax.jit(attended, static_argnums=(1, 2))
    x = jnp.ones((1, 4, 1, 4))
    for _ in range(3):
        compiled(x, masks.Causal() & masks.Window(2, 0), scores.scaled(scores.dot, 0.5))
    assert len(traces) == 1


def test_a_dataclass_of_ones_own_compares_by_value_too():
    @dataclasses.dataclass(frozen=True)
    class Marked(masks.Mask):
        marks: np.ndarray

        def __call__(self, q_idx, kv_idx):
            return self.marks[q_idx] == self.marks[kv_idx]

    marked = [Marked(np.array(marks)) for marks in ([0, 1], [0, 1], [1, 1])]
    assert marked[0] == marked[1] != marked[2]
    assert hash(marked[0]) == hash(marked[1])

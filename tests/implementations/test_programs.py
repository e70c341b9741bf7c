"""Outside `jit`: equal calls share a program, and what changes is never taken from an old one."""

import dataclasses
import functools
import gc
import itertools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, per_head, scores, statistics
from attention_jax.implementations import constants, programs

T, H = 12, 4
TILED = {"implementation": "tiled", "tile_sizes": (4, 4)}
FACTOR = 1.0
TABLE = jnp.ones((1,))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


X = normal(1, T, 2, H)
WEIGHT = normal(H, H)


@pytest.fixture
def compiled():
    """Count the programs that are compiled."""
    names = []

    def heard(name, _, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            names.append(name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield names
    jax.monitoring.unregister_event_duration_listener(heard)


def additive():
    return bind(
        scores.additive, query_weight=WEIGHT, key_weight=WEIGHT, value=WEIGHT[0], bias=WEIGHT[1]
    )


CASES = {
    "default": dict,
    "causal": lambda: {"mask": masks.Causal()},
    "window": lambda: {"mask": masks.Causal() & masks.Window(3, 0)},
    "longformer": lambda: {"mask": masks.longformer(2, np.arange(T) < 2)},
    "segments known late": lambda: {"mask": masks.Segment(jnp.arange(T) // 5)},
    "additive": lambda: {"score": additive()},
    "bilinear per head": lambda: {
        "score": per_head(bind(scores.bilinear, weight=jnp.stack([WEIGHT, WEIGHT])))
    },
    "composed": lambda: {"score": scores.scaled(scores.projected(scores.dot, WEIGHT), 0.5)},
    "sink": lambda: {"normalizer": bind(normalizers.softmax_with_sink, sink=0.5)},
    "dropout": lambda: {"dropout_rate": 0.5, "dropout_key": jax.random.key(0)},
    "bias": lambda: {"bias": np.ones((T, T), np.float32)},
    "functions of the user": lambda: {
        "score": lambda query, key: query @ key.T,
        "bias": lambda q_idx, kv_idx: WEIGHT[q_idx % H, kv_idx % H],
        "mask": masks.Causal() & masks.as_mask(lambda q_idx, kv_idx: (q_idx + kv_idx) % 3 != 1),
    },
}
TRANSFORMED = {
    "value": lambda f: f,
    "gradient": jax.grad,
    "value and gradient": jax.value_and_grad,
    "tangent": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
}


def cases():
    """Everything that is called twice; with one derivative, in turn, outside exhaustive tests."""
    hows_in_turn = itertools.cycle(TRANSFORMED)
    for name in CASES:
        chosen = ("gradient", next(hows_in_turn)) if name == "causal" else (next(hows_in_turn),)
        for how in TRANSFORMED:
            marks = [pytest.mark.slow] * ((name, how) != ("causal", "gradient"))
            marks += [pytest.mark.exhaustive] * (how not in chosen)
            yield pytest.param(name, how, marks=marks)


@pytest.mark.parametrize(("name", "how"), list(cases()))
def test_a_second_call_compiles_nothing(name, how, compiled):
    def attended(x):
        return jnp.sum(jnp.sin(attend(x, x, x, **TILED, **CASES[name]())))

    programs._program.cache_clear()
    first = TRANSFORMED[how](attended)(X)
    assert compiled
    compiled.clear()
    again = TRANSFORMED[how](attended)(X)
    assert not compiled
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_equal_statistics_compile_nothing_and_others_do(compiled):
    def attended(limit):
        asked = {
            "near": statistics.mass(lambda q_idx, kv_idx: kv_idx < limit),
            "own": statistics.Statistic(lambda pairs: limit * pairs.weights.sum(axis=1)),
        }
        return attend(X, X, X, statistics=asked).statistics

    attended(1)
    compiled.clear()
    first = attended(1)
    assert not compiled
    second = attended(2)
    assert compiled and np.all(second["near"] > first["near"])
    np.testing.assert_allclose(second["own"], 2.0, rtol=1e-6)


def test_new_values_of_arrays_compile_nothing(compiled):
    for step in range(3):
        compiled.clear()
        attend(
            X + step,
            X,
            X,
            score=bind(scores.bilinear, weight=step * WEIGHT),
            mask=masks.Causal(jnp.int32(step)) & masks.Lengths(np.array([5 + step])),
            **TILED,
        )
    assert not compiled


@pytest.mark.slow
def test_a_numpy_array_from_which_tiles_are_planned_is_read_anew():
    ids = np.zeros(T, np.int32)
    for same in (True, False):
        ids[T // 2 :] = 0 if same else 1
        dense = attend(X, X, X, mask=masks.Segment(ids.copy()).to_dense(T), implementation="dense")
        found = attend(X, X, X, mask=masks.Segment(ids), **TILED)
        np.testing.assert_allclose(found, dense, atol=1e-6)


def times(factor):
    return attend(X, X, X, score=scores.scaled(scores.dot, factor), **TILED)


@pytest.mark.slow
def test_a_global_that_a_score_names_may_change(monkeypatch):
    def score(query, key):
        return FACTOR * (query @ key.T)

    for factor in (1.0, 2.0, 1.0):
        monkeypatch.setitem(globals(), "FACTOR", factor)
        np.testing.assert_allclose(attend(X, X, X, score=score, **TILED), times(factor), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_arrays_of_equal_bytes_are_told_apart_by_their_dtype(dtype):
    one, other = (np.full(1, 0x38, np.uint8).view(jnp.dtype(of)) for of in (dtype, "float8_e4m3fn"))
    is_same = constants.Constant.of(one) == constants.Constant.of(other)
    assert is_same == (dtype == "float8_e4m3fn")
    np.testing.assert_array_equal(constants.Constant.of(one).array, one)


@pytest.mark.slow
def test_lambdas_of_one_line_are_told_apart_by_what_they_close_over():
    functions = [lambda query, key, n=n: n * (query @ key.T) for n in (1.0, 2.0)]
    functions += [functools.partial(lambda n, query, key: n * (query @ key.T), n) for n in (3.0,)]
    for factor, score in zip((1.0, 2.0, 3.0), functions, strict=True):
        np.testing.assert_allclose(attend(X, X, X, score=score, **TILED), times(factor), atol=1e-6)


@pytest.mark.slow
def test_what_a_score_closes_over_may_change():
    factors, factor = [1.0], 1.0

    def of_list(query, key):
        return factors[0] * (query @ key.T)

    def of_variable(query, key):
        return factor * (query @ key.T)

    def of_default(query, key, *, scale=factors):
        return scale[0] * (query @ key.T)

    for factor in (1.0, 3.0, 1.0):
        factors[0] = factor
        for score in (of_list, of_variable, of_default):
            np.testing.assert_allclose(
                attend(X, X, X, score=score, **TILED), times(factor), atol=1e-6
            )


class Settings:
    factor = 1.0


@pytest.mark.slow
def test_an_attribute_of_a_class_or_module_may_change(monkeypatch):
    module = types.ModuleType("settings")
    for factor in (1.0, 3.0):
        module.factor = factor
        monkeypatch.setattr(Settings, "factor", factor)
        for score in (
            lambda query, key: module.factor * (query @ key.T),
            lambda query, key: Settings.factor * (query @ key.T),
        ):
            np.testing.assert_allclose(
                attend(X, X, X, score=score, **TILED), times(factor), atol=1e-6
            )


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, query, key):
        return self.factor * (query @ key.T)

    def method(self, query, key):
        return self(query, key)


@dataclasses.dataclass(frozen=True)
class Frozen:
    factor: float

    def __call__(self, query, key):
        return self.factor * (query @ key.T)


@pytest.mark.slow
def test_an_object_that_is_a_score_may_change():
    score = Scaled(1.0)
    for factor in (1.0, 3.0, 1.0):
        score.factor = factor
        for function in (score, score.method, functools.partial(score), lambda q, k: score(q, k)):
            np.testing.assert_allclose(
                attend(X, X, X, score=function, **TILED), times(factor), atol=1e-6
            )


@pytest.mark.slow
def test_a_frozen_object_is_known_by_its_parts(compiled):
    first = attend(X, X, X, score=Frozen(2.0), **TILED)
    compiled.clear()
    np.testing.assert_array_equal(attend(X, X, X, score=Frozen(2.0), **TILED), first)
    assert not compiled
    np.testing.assert_allclose(attend(X, X, X, score=Frozen(3.0), **TILED), times(3.0), atol=1e-6)


@pytest.mark.slow
def test_an_array_that_a_function_closes_over_is_differentiated():
    def loss(weight):
        def score(query, key):
            return (query * weight[None, :]) @ key.T

        return jnp.sum(jnp.sin(attend(X, X, X, score=score, **TILED)))

    for weight in (WEIGHT[0], WEIGHT[1], WEIGHT[0]):
        np.testing.assert_allclose(jax.grad(loss)(weight), jax.jit(jax.grad(loss))(weight), 1e-5)


@pytest.mark.slow
def test_a_mask_of_the_user_may_change_too():
    limit = [0]
    for limit[0] in (0, 3, 0):
        found = attend(X, X, X, mask=lambda q_idx, kv_idx: q_idx - kv_idx >= limit[0], **TILED)
        np.testing.assert_allclose(
            found, attend(X, X, X, mask=masks.Causal(-limit[0]), **TILED), atol=1e-6
        )


def changeable(i):
    """Return a mask of a new object at each call: it may change in place."""
    settings = Settings()
    settings.shift = i
    return lambda q_idx, kv_idx: q_idx + settings.shift >= kv_idx


NOTHING_KEPT: dict[str, dict[str, Any]] = {
    "operations": {"implementation": "dense"},
    "a loop over tiles": TILED,
    "a loop within a score": {"implementation": "dense", "score": additive()},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "with_gradient"),
    [
        ("operations", False),
        pytest.param("a loop over tiles", False, marks=pytest.mark.exhaustive),
        ("a loop over tiles", True),
        pytest.param("a loop within a score", False, marks=pytest.mark.exhaustive),
    ],
)
def test_a_call_that_is_traced_anew_leaves_nothing_compiled_behind(name, with_gradient):
    x = X[:, :8]

    def live(i):
        def total(x):
            return attend(x, x, x, mask=changeable(i), **NOTHING_KEPT[name]).sum()

        (jax.grad(total) if with_gradient else total)(x).block_until_ready()
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    first = live(0)
    assert live(1) == first


HOST = np.arange(T)
FROM_THE_HOST: dict[str, dict[str, Any]] = {
    "bias": {"bias": np.ones((T, T), np.float32)},
    "mask": {"mask": HOST[:, None] >= HOST},
    "closing over an object": {"mask": changeable(1)},
    "closing over an object and NumPy": {
        "mask": masks.as_mask(changeable(1)) & (lambda q_idx, kv_idx: jnp.asarray(HOST)[q_idx] >= 0)
    },
    "closing over NumPy": {"bias": lambda q_idx, kv_idx: jnp.asarray(HOST)[q_idx - kv_idx]},
}


@pytest.mark.parametrize(
    ("options", "implementation"),
    [
        pytest.param(
            options,
            kind,
            id=f"{name}-{kind}",
            marks=[pytest.mark.slow] * ((name, kind) != ("bias", "dense")),
        )
        for name, options in FROM_THE_HOST.items()
        for kind in ("dense", "tiled")
        if kind == "dense" or name in ("bias", "closing over an object")
    ],
)
def test_numbers_of_the_host_pass_a_guard_of_transfers(options, implementation):
    chosen: dict[str, Any] = TILED if implementation == "tiled" else {"implementation": "dense"}
    with jax.transfer_guard("disallow"):
        assert attend(X, X, X, **options, **chosen).shape == X.shape


def test_programs_are_forgotten():
    """A score that is new at each call does not fill the memory."""
    for _ in range(3):
        attend(X, X, X, score=lambda query, key: query @ key.T, implementation="dense")
    assert programs._program.cache_info().maxsize == programs.MOST_PROGRAMS

"""Functions that are new at each call, over new arrays, share a program; nothing of them is kept.

What is counted, over twenty calls: programs that are compiled, executables that live, and arrays.
"""

import dataclasses
import functools
import gc
import weakref
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, per_head, scores, statistics
from attention_jax.base.binding import rule
from attention_jax.implementations import closures, programs
from attention_jax.implementations.recipes import ChangeableError

T, H = 8, 4
CALLS = 20
TILED = {"implementation": "tiled", "tile_sizes": (4, 4)}
DENSE = {"implementation": "dense"}
SHARED: Any = None  # what tests assign to a global
STEP = 1.0


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


X = normal(1, T, 2, H)


def bilinear(query, key, weight):
    return query @ weight @ key.T


@dataclasses.dataclass(frozen=True)
class Frozen:
    weight: Any

    def method(self, query, key):
        return self.mapped(query) @ key.T

    def mapped(self, query):
        return query @ self.weight


@dataclasses.dataclass(frozen=True)
class Called(Frozen):
    def __call__(self, query, key):
        return self.method(query, key)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    weight: Any

    def method(self, query, key):
        return query @ self.weight @ key.T


class Parameters(NamedTuple):
    weight: Any
    scale: float


class Plain:
    def __init__(self, weight):
        self.weight = weight

    def method(self, query, key):
        return query @ self.weight @ key.T


def nested(weight):
    def mapped(query):
        return query @ weight

    def score(query, key):
        return mapped(query) @ key.T

    return score


def recursive(weight):
    def power(query, times):
        return power(query @ weight, times - 1) if times else query

    return lambda query, key: power(query, 2) @ key.T


def with_rule(weight):
    def score(query, key):
        return query @ weight @ key.T

    @rule(score, "separation")
    def separated():
        return scores.projected(scores.dot, weight)

    return score


def custom(weight):
    @jax.custom_jvp
    def mapped(query):
        return query @ weight

    mapped.defjvps(lambda tangent, result, query: 2.0 * tangent @ weight)
    return lambda query, key: mapped(query) @ key.T


@jax.custom_jvp
def custom_product(weight, query):
    return query @ weight


custom_product.defjvps(None, lambda tangent, result, weight, query: 2.0 * tangent @ weight)


def in_dict(weight):
    parameters = {"layers": [{"weight": weight}], "scale": 0.5}
    return lambda query, key: (
        parameters["scale"] * (query @ parameters["layers"][0]["weight"] @ key.T)
    )


def in_tuple(weight):
    parameters = Parameters(weight, 0.5)
    return lambda query, key: parameters.scale * (query @ parameters.weight @ key.T)


def of_pairs(weight):
    of_pair = jax.vmap(lambda q, k: q @ weight @ k, (None, 0))
    return jax.vmap(of_pair, (0, None))


def bound_within(weight):
    inner = bind(scores.bilinear, weight=weight)
    return lambda query, key: 0.5 * inner(query, key)


def soft(weight):
    return lambda logits, allowed: normalizers.softmax(logits * jnp.abs(weight[0, 0]), allowed)


def over_heads(weight):
    return lambda logits: jnp.einsum("mn,nts->mts", weight[:2, :2], logits)


KINDS: dict[str, Any] = {
    "lambda": lambda w: {"score": lambda query, key: query @ w @ key.T},
    "nested": lambda w: {"score": nested(w)},
    "recursive": lambda w: {"score": recursive(w)},
    "default": lambda w: {"score": lambda query, key, weight=w: query @ weight @ key.T},
    "partial": lambda w: {"score": functools.partial(bilinear, weight=w)},
    "Partial": lambda w: {
        "score": jax.tree_util.Partial(lambda scale, query, key: scale * (query @ w @ key.T), 0.5)
    },
    "bound lambda": lambda w: {"score": bind(lambda q, k, scale: scale * (q @ w @ k.T), scale=0.5)},
    "bound within": lambda w: {"score": bound_within(w)},
    "frozen": lambda w: {"score": Called(w)},
    "method of a frozen object": lambda w: {"score": Frozen(w).method},
    "method of an object with slots": lambda w: {"score": Slots(w).method},
    "dict": lambda w: {"score": in_dict(w)},
    "tuple": lambda w: {"score": in_tuple(w)},
    "jit": lambda w: {"score": jax.jit(lambda query, key: query @ w @ key.T)},
    "vmap": lambda w: {"score": of_pairs(w)},
    "rule": lambda w: {"score": with_rule(w)},
    "composed": lambda w: {"score": scores.scaled(nested(w), 0.5)},
    "per head": lambda w: {
        "score": per_head(bind(lambda q, k, scale: scale * (q @ w @ k.T), scale=w[0, :2]))
    },
    "bias": lambda w: {"bias": lambda q_idx, kv_idx: w[q_idx % H, kv_idx % H]},
    "mask": lambda w: {"mask": lambda q_idx, kv_idx: w[0, q_idx % H] < 1.0 + w[1, kv_idx % H]},
    "part of a mask": lambda w: {
        "mask": masks.Causal() & masks.as_mask(lambda q_idx, kv_idx: w[0, kv_idx % H] > -1.0)
    },
    "masks of heads": lambda w: {
        "mask": masks.Heads([masks.Causal(), masks.as_mask(lambda q, k: w[0, k % H] > -1.0)])
    },
    "normalizer": lambda w: {"normalizer": soft(w)},
    "statistic": lambda w: {
        "statistics": {
            "own": statistics.Statistic(lambda pairs: w[0, 0] * (pairs.weights**2).sum(1))
        }
    },
    "map across heads": lambda w: {"mix_logits": over_heads(w)},
}
ONLY_DENSE = ("normalizer",)
OF_MASKS = ("mask", "part of a mask", "masks of heads")
QUICK = ("lambda",)
CHEAP = ("vmap", "bias", "part of a mask", "statistic")
CLOSED = "gradient of what it closes over"
TRANSFORMED = {
    "value": lambda loss: loss,
    "gradient": jax.grad,
    CLOSED: lambda loss: jax.grad(loss, 1),
    "vmap": lambda loss: lambda x, w: jax.vmap(loss, (None, 0))(x, jnp.stack([w, 2 * w])),
}


def loss_of(name, implementation):
    def loss(x, weight):
        found = attend(x, x, x, **implementation, **KINDS[name](weight))
        if name == "statistic":
            return jnp.sum(jnp.sin(found.context)) + jnp.sum(jnp.sin(found.statistics["own"]))
        return jnp.sum(jnp.sin(found))

    return loss


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


def alive():
    gc.collect()
    return len(jax.live_arrays()), len(jax.devices()[0].client.live_executables())


def cases():
    for name in KINDS:
        for how in TRANSFORMED:
            for kind, implementation in (("dense", DENSE), ("tiled", TILED)):
                if kind == "tiled" and name in ONLY_DENSE:
                    continue
                is_quick = kind == "dense" and how == "value" and name in QUICK
                is_cheap = kind == "dense" and how == CLOSED and name in CHEAP
                is_cheap |= kind == "tiled" and how == CLOSED and name == "lambda"
                marks = [pytest.mark.slow] * (not is_quick)
                marks += [pytest.mark.exhaustive] * (not is_quick and not is_cheap)
                yield pytest.param(
                    name, how, implementation, id=f"{name}-{how}-{kind}", marks=marks
                )


@pytest.mark.parametrize(("name", "how", "implementation"), list(cases()))
def test_a_function_that_is_new_at_each_call_compiles_once(
    name, how, implementation, compiled, monkeypatch
):
    # Run an operation at a time, it would compile nothing either.
    monkeypatch.setattr(programs, "_once", None)
    function = TRANSFORMED[how](loss_of(name, implementation))
    weights = [normal(H, H, seed=step) for step in range(CALLS)]
    found = [function(X, weight) for weight in weights[:2]]
    expected = jax.jit(function)(X, weights[-1])
    before = alive()
    compiled.clear()
    for weight in weights[2:]:
        last = function(X, weight)
    assert not compiled
    after = alive()
    assert after[0] <= before[0] + 1 and after[1] <= before[1]  # the one is `last`
    np.testing.assert_allclose(last, expected, rtol=1e-4, atol=1e-5)
    assert np.allclose(found[0], found[1]) == (name in OF_MASKS and how == CLOSED)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [DENSE, TILED])
def test_methods_of_an_object_that_may_change_leave_nothing_behind(implementation):
    def step(i):
        weight = normal(H, H, seed=i)
        found = attend(X, X, X, score=Plain(weight).method, **implementation)
        expected = attend(X, X, X, score=nested(weight), **implementation)
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    step(0)
    before = alive()
    for i in range(3):
        step(i)
    assert alive() == before


@pytest.mark.slow
def test_a_global_array_may_be_new_at_each_call(compiled, monkeypatch):
    for step in range(3):
        compiled.clear()
        weight = normal(H, H, seed=step)
        monkeypatch.setitem(globals(), "SHARED", weight)
        found = attend(X, X, X, score=lambda query, key: query @ SHARED @ key.T, **DENSE)
        expected = attend(X, X, X, score=bind(scores.bilinear, weight=weight), **DENSE)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not compiled


@pytest.mark.parametrize("content", ["list", "dict", "array"])
def test_what_a_list_dict_or_array_holds_may_change(content):
    kept = {"list": [1.0], "dict": {0: 1.0}, "array": np.ones(1, np.float32)}[content]
    for factor in (1.0, 3.0, 1.0):
        kept[0] = factor
        found = attend(X, X, X, score=lambda query, key: kept[0] * (query @ key.T), **DENSE)
        expected = attend(X, X, X, score=scores.scaled(scores.dot, factor), **DENSE)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("content", ["list", "dict", "array", "variable", "global"])
def test_what_a_function_writes_is_seen_by_the_user(content, monkeypatch):
    kept = {"list": [0], "dict": {0: 0}, "array": np.zeros(1, int)}.get(content)
    count = 0
    monkeypatch.setitem(globals(), "SHARED", 0)

    def written(query, key):
        kept[0] += 1
        return query @ key.T

    def counted(query, key):
        nonlocal count
        count += 1
        return query @ key.T

    def counted_globally(query, key):
        global SHARED
        SHARED += 1
        return query @ key.T

    score = {"variable": counted, "global": counted_globally}.get(content, written)
    seen = []
    for _ in range(2):
        attend(X, X, X, score=score, **DENSE)
        seen.append({"variable": count, "global": SHARED}.get(content) or int(kept[0]))
    assert 0 < seen[0] < seen[1]


MODULE = """
import jax.numpy as jnp
weight, other = jnp.eye(4), jnp.arange(7.0)
def scaled(query):
    return 2.0 * query
def score(query, key):
    return scaled(query) @ weight @ key.T
def looked_up(query, key):
    return globals()["scaled"](query) @ key.T
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["score", "looked_up"])
def test_nothing_of_a_module_is_held_by_its_functions(name):
    """Programs keep what a derivative needs, and this not all the rest of a notebook."""
    module: dict[str, Any] = {"__name__": "notebook"}
    exec(MODULE, module)
    other = weakref.ref(module["other"])

    def loss(x):
        return jnp.sum(jnp.sin(attend(x, x, x, score=module[name], **TILED)))

    found = jax.grad(loss)(X)
    scaled = scores.scaled(scores.dot, 2.0)
    expected = jax.grad(lambda x: jnp.sum(jnp.sin(attend(x, x, x, score=scaled, **TILED))))(X)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    module.clear()
    gc.collect()
    assert other() is None


def variable(value):
    """Return a score that closes over a variable, and what assigns to it."""
    factor = value

    def score(query, key):
        return factor * (query @ key.T)

    def assign(value):
        nonlocal factor
        factor = value

    return score, assign


@pytest.mark.parametrize("shape", [pytest.param((1, T - 1, 2, H), id="shape"), (2, T, 2, H)])
def test_a_program_keeps_what_its_first_function_was(shape):
    """Traced again for other shapes, it does not see what became of that function."""
    first, assign = variable(5.0)
    attend(X, X, X, score=first, **DENSE)
    assign(7.0)
    second, _ = variable(5.0)
    x = normal(*shape)
    expected = attend(x, x, x, score=scores.scaled(scores.dot, 5.0), **DENSE)
    np.testing.assert_allclose(attend(x, x, x, score=second, **DENSE), expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Stepping:
    weight: Any
    width = 1.0

    def method(self, query, key):
        return self.scale() * (query @ self.weight @ key.T)

    def scale(self):
        return STEP * self.width


@pytest.mark.slow
def test_what_the_methods_of_a_frozen_object_name_may_change(monkeypatch):
    weight = normal(H, H)
    for step, width in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.25), (1.0, 1.0)):
        monkeypatch.setitem(globals(), "STEP", step)
        monkeypatch.setattr(Stepping, "width", width)
        for score in (
            Stepping(weight).method,
            lambda query, key: Stepping(weight).method(query, key),
            lambda query, key, kept=Stepping(weight): kept.method(query, key),
        ):
            found = attend(X, X, X, score=score, **DENSE)
            scaled = bind(scores.bilinear, weight=step * width * weight)
            np.testing.assert_allclose(found, attend(X, X, X, score=scaled, **DENSE), rtol=1e-5)


NEEDING = {
    "float": lambda number: lambda query, key: float(number) * (query @ key.T),
    "if": lambda number: lambda query, key: (1.0 if number else 0.0) * (query @ key.T),
    "index": lambda number: lambda query, key: [0.0, 1.0][number] * (query @ key.T),
    "NumPy": lambda number: lambda query, key: np.asarray(number, np.float32) * (query @ key.T),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.exhaustive] * (x != "float")) for x in NEEDING]
)
def test_a_function_may_need_the_numbers_of_an_array(name, compiled):
    arrays = [jnp.int32(0), jnp.int32(1)]
    for number in (*arrays, *arrays):
        compiled.clear()
        found = attend(X, X, X, score=NEEDING[name](number), **DENSE)
        again = len(compiled)
        expected = attend(X, X, X, score=scores.scaled(scores.dot, float(number)), **DENSE)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not again
    counts = []
    for step in range(2 * programs.MOST_OF_NUMBERS):
        attend(X, X, X, score=NEEDING[name](jnp.int32(step % 2)), **DENSE)
        counts.append(alive())
    assert len(set(counts[programs.MOST_OF_NUMBERS :])) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(DENSE, id="dense"),
        pytest.param(TILED, id="tiled", marks=pytest.mark.exhaustive),
    ],
)
def test_a_custom_derivative_may_close_over_an_array(implementation):
    def loss(x, score):
        return jnp.sum(jnp.sin(attend(x, x, x, score=score, **implementation)))

    for seed in range(2):
        weight = normal(H, H, seed=seed)
        expected = jax.value_and_grad(loss)(X, lambda q, k, w=weight: custom_product(w, q) @ k.T)
        found = jax.value_and_grad(loss)(X, custom(weight))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), found, expected)


@pytest.mark.parametrize(("one", "other"), [(0.0, -0.0), (1, 1.0), (1, True), (2.0, 2.0j)])
def test_numbers_that_are_equal_but_not_the_same(one, other):
    first, second = (_structure(lambda query, key, n=n: n * query) for n in (one, other))
    assert first != second


def _structure(function, **options):
    return jax.tree.structure(closures.opened(function, **options))


def test_equal_functions_have_equal_structures():
    made = [_structure(lambda query, key, w=w: query @ w + np.nan) for w in (X, X + 1)]
    assert made[0] == made[1] and hash(made[0]) == hash(made[1])


def test_a_function_that_is_shared_now_may_be_another_one_then():
    one, same = nested(X), nested(X)
    first, second = (_structure(lambda q, k, f=f: one(q, k) + f(q, k)) for f in (one, same))
    assert first != second  # both right, and told apart


@pytest.mark.parametrize(
    "changeable",
    [Plain(1), [0] * 2000, np.zeros(2**18), np.array([Plain(1)]), {}.get, [].append, Plain],
    ids=["object", "long list", "large array", "objects", "of a dict", "of a list", "class"],
)
def test_what_can_change_has_no_structure(changeable):
    with pytest.raises(ChangeableError):
        _structure(lambda query, key: changeable)


def test_a_key_of_random_numbers_may_be_closed_over():
    key = jax.random.key(0)
    found = attend(
        X, X, X, bias=lambda q, k: jax.random.normal(key, jnp.broadcast_shapes(q.shape, k.shape))
    )
    assert found.shape == X.shape


def test_a_list_within_itself_has_no_structure():
    kept: list[Any] = []
    kept.append(kept)
    with pytest.raises(ChangeableError):
        _structure(lambda query, key: kept)


def test_a_deleted_array_that_is_not_used_does_no_harm():
    parameters = {"weight": normal(H, H), "old": normal(H)}
    parameters["old"].delete()

    def score(query, key):
        return query @ parameters["weight"] @ key.T

    expected = attend(X, X, X, score=bind(scores.bilinear, weight=parameters["weight"]), **DENSE)
    np.testing.assert_allclose(attend(X, X, X, score=score, **DENSE), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param(DENSE, id="dense"),
        pytest.param(TILED, id="tiled", marks=pytest.mark.exhaustive),
    ],
)
def test_closures_pass_the_checks_of_jax(implementation):
    loss = loss_of("nested", implementation)
    weight = normal(H, H)
    expected = jax.grad(loss, (0, 1))(X, weight)
    with jax.transfer_guard("disallow"):
        value = attend(X, X, X, score=nested(weight), **implementation)
    assert value.shape == X.shape
    with jax.checking_leaks():
        found = jax.grad(loss, (0, 1))(X, weight)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)

import ast
import functools
import inspect
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from attention_jax import attend, bind, masks, normalizers, per_head, scores
from attention_jax.base.checks import ShapeError
from attention_jax.interop import attention_fn
from attention_jax.positions import relative_key

B, T, S, N, H = 2, 5, 7, 4, 3
D = N * H
RNG = np.random.default_rng(0)


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


QUERY, KEY, VALUE = normal(B, T, N, H), normal(B, S, N, H), normal(B, S, N, H)
X, MEMORY = normal(B, T, D), normal(B, S, D)
ALLOWED = RNG.random((B, N, T, S)) < 0.6
ALLOWED[..., 0] = True


def is_close(actual, expected, tolerance=2e-5):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            x.astype(jnp.float32), y.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def compiled(function, *operands, **options):
    return jax.jit(functools.partial(function, **options))(*operands)


def keywords_of_call(layer):
    """Return the keywords that a layer's source gives to its attention_fn."""
    source = textwrap.dedent(inspect.getsource(layer.__call__))
    found = set()
    for node in ast.walk(ast.parse(source)):
        is_call = isinstance(node, ast.Call)
        if is_call and ast.unparse(node.func) == "self.attention_fn":
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "attn_kwargs":
            found |= {keyword.arg for keyword in getattr(node.value, "keywords", ())}
    return found


@pytest.mark.parametrize("layer", [linen.MultiHeadDotProductAttention, nnx.MultiHeadAttention])
def test_every_keyword_of_the_layers_is_named(layer):
    """Linen drops in silence what a signature does not name."""
    keywords = keywords_of_call(layer)
    assert {"mask", "dropout_rng", "broadcast_dropout", "precision", "module"} <= keywords
    parameters = inspect.signature(attention_fn()).parameters
    assert keywords <= set(parameters)
    assert all(p.kind != p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("function", [linen.dot_product_attention, nnx.dot_product_attention])
def test_positional_arguments_and_defaults_are_those_of_flax(function):
    ours, theirs = (inspect.signature(f).parameters for f in (attention_fn(), function))
    shared = list(theirs)[: list(theirs).index("module") + 1]
    assert list(ours)[: len(shared)] == shared
    assert all(ours[name].default == theirs[name].default for name in set(ours) & set(theirs))


LINEN = {
    "cross, boolean mask, no batch axis": (
        (X[0], MEMORY[0]),
        {"mask": ALLOWED[0]},
        {"normalize_qk": True},
    ),
    "self, float mask for all heads, two batch axes": (
        (normal(3, B, T, D),),
        {"mask": linen.make_causal_mask(jnp.ones((3, 1, T)))},
        {"force_fp32_for_softmax": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEN)
def test_linen_layer_equals_flax(name):
    """Compare context, sown weights and the gradient of every parameter."""
    inputs, call, options = LINEN[name]

    def run(**attention):
        layer = linen.MultiHeadDotProductAttention(num_heads=N, **options, **attention)
        variables = compiled(layer.init, jax.random.key(0), *inputs)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(variables):
            context, sown = layer.apply(
                variables, *inputs, **call, sow_weights=True, mutable="intermediates"
            )
            return jnp.sum(jnp.sin(context)), (context, sown)

        return loss(variables)

    is_close(run(attention_fn=attention_fn()), run())


NNX = {
    "self, causal": ((X,), {"is_causal": True}, {}),
    "grouped, causal and mask, sown": (
        (X, MEMORY),
        {"is_causal": True, "mask": ALLOWED.astype(np.float32), "sow_weights": True},
        {"num_kv_heads": 2, "normalize_qk": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NNX)
def test_nnx_layer_equals_flax(name):
    inputs, call, options = NNX[name]

    def run(**attention):
        layer = nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0), **options, **attention)
        structure, parameters, rest = nnx.split(layer, nnx.Param, ...)

        @jax.jit
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(parameters):
            captured = nnx.capture(nnx.Intermediate)(lambda layer: layer(*inputs, **call))
            context, sown = captured(nnx.merge(structure, parameters, rest))
            return jnp.sum(jnp.sin(context)), (context, nnx.to_pure_dict(sown))

        (_, (context, sown)), gradients = loss(parameters)
        assert bool(sown) == ("sow_weights" in call)
        return context, sown, nnx.to_pure_dict(gradients)

    is_close(run(attention_fn=attention_fn()), run())


def test_dtype_of_a_layer():
    layer = linen.MultiHeadDotProductAttention(N, dtype=jnp.bfloat16, attention_fn=attention_fn())
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    apply = functools.partial(layer.apply, sow_weights=True, mutable="intermediates")
    context, sown = jax.eval_shape(apply, variables, X)
    assert context.dtype == jnp.bfloat16
    assert sown["intermediates"]["attention_weights"][0].dtype == jnp.bfloat16
    forced = layer.clone(force_fp32_for_softmax=True)
    _, sown = jax.eval_shape(
        functools.partial(forced.apply, sow_weights=True, mutable="intermediates"), variables, X
    )
    assert sown["intermediates"]["attention_weights"][0].dtype == jnp.float32


def test_dtype_argument():
    context = compiled(attention_fn(), QUERY, KEY, VALUE, dtype=jnp.bfloat16)
    rounded = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
    assert context.dtype == jnp.bfloat16
    is_close(context, compiled(attend, *rounded), 0.0)


def test_complex_numbers_are_left_to_flax():
    operands = [jax.lax.complex(x, x[::-1]) for x in (QUERY, KEY, VALUE)]
    with jax.numpy_dtype_promotion("standard"):  # Flax's masks need it
        expected = linen.dot_product_attention(*operands, mask=ALLOWED)
        np.testing.assert_array_equal(attention_fn()(*operands, mask=ALLOWED), expected)


@pytest.mark.slow
def test_a_complex_layer_equals_flax():
    layers = [
        linen.MultiHeadDotProductAttention(
            N, dtype=jnp.complex64, param_dtype=jnp.complex64, **options
        )
        for options in ({}, {"attention_fn": attention_fn()})
    ]
    x = jnp.asarray(X, jnp.complex64)
    expected, found = (layer.init_with_output(jax.random.key(0), x)[0] for layer in layers)
    np.testing.assert_array_equal(found, expected)


def test_empty_rows_are_zeros():
    mask = np.ones((1, 1, T, S), bool)
    mask[0, 0, 2] = False
    context = compiled(attention_fn(), QUERY, KEY, VALUE, mask=mask)
    assert not context[:, 2].any()
    assert context[:, 1].all()


def slope_times_distance(q_idx, kv_idx, slope):
    return -slope * jnp.abs(q_idx - kv_idx).astype(jnp.float32)


ALIBI = per_head(bind(slope_times_distance, slope=0.5 ** np.arange(N)))


def test_everything_bound_meets_everything_passed():
    """Masks intersect and biases add up, as in one call of attend."""
    bound, passed = normal(N, T, S), normal(B, 1, 1, S)
    options = {"score": scores.cosine, "normalizer": normalizers.sigmoid}
    window = masks.Window(1, 3) & masks.Lengths(np.array([4, 6]))
    function = attention_fn(mask=window, bias=bound, implementation="tiled", **options)
    context = compiled(function, QUERY, KEY, VALUE, mask=ALLOWED, bias=passed, is_causal=True)
    together = {"mask": window & masks.Causal() & ALLOWED, "bias": bound[None] + passed}
    is_close(context, compiled(attend, QUERY, KEY, VALUE, **together, **options))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask", "function"])
def test_masks_of_every_kind_bound_or_passed(kind):
    dense = np.tri(T, S, dtype=bool)
    mask = {"mask": masks.Causal(), "function": lambda i, j: i >= j}[kind]
    expected = compiled(attend, QUERY, KEY, VALUE, mask=dense)
    is_close(compiled(attention_fn(mask=mask), QUERY, KEY, VALUE), expected)
    is_close(compiled(attention_fn(), QUERY, KEY, VALUE, mask=mask), expected)


@pytest.mark.slow
def test_arrays_of_several_batch_axes():
    """Any of the axes [*batch, N, T, S] may be 1 or be left out."""
    operands = [jnp.stack([x, -x, 2 * x]) for x in (QUERY, KEY, VALUE)]
    for shape in [(S,), (B, N, 1, 1), (1, 1, 1, T, 1), (3, 1, 1, 1, S)]:
        mask, bias = RNG.random(shape) < 0.7, normal(*shape)
        context = compiled(attention_fn(), *operands, mask=mask, bias=bias)
        whole = [jnp.broadcast_to(x, (3, B, N, T, S)) for x in (mask, bias)]
        each = jax.vmap(lambda q, k, v, mask, bias: attend(q, k, v, mask=mask, bias=bias))
        is_close(context, compiled(each, *operands, *whole))


@pytest.mark.slow
def test_bound_parameters_have_exact_gradients():
    """A score with parameters inside a Linen layer, as a parent module would hold it."""
    layer = linen.MultiHeadDotProductAttention(N)
    variables = compiled(layer.init, jax.random.key(0), X)
    parameters = {
        "query_weight": normal(N, H, 2),
        "key_weight": normal(N, H, 2),
        "value": normal(N, 2),
        "bias": normal(N, 2),
    }

    @jax.jit
    def loss(parameters):
        function = attention_fn(score=per_head(bind(scores.additive, **parameters)))
        return jnp.sum(jnp.sin(layer.clone(attention_fn=function).apply(variables, X)))

    gradients = jax.grad(loss)(parameters)
    assert all(gradient.any() for gradient in jax.tree.leaves(gradients))
    step = jax.tree.map(lambda x: 1e-2 * jnp.sign(x), gradients)
    forth, back = (
        loss(jax.tree.map(lambda x, y, sign=sign: x + sign * y, parameters, step))
        for sign in (1, -1)
    )
    slopes = jax.tree.map(jnp.vdot, gradients, step)
    is_close((forth - back) / 2, sum(slopes.values()), 1e-2)


@functools.partial(jax.jit, static_argnames=("broadcast", "deterministic", "implementation"))
def what_is_dropped(key, broadcast, deterministic=False, implementation=None):
    """Return the factor of every weight, [B, N, T, S]: the values are unit vectors."""
    query, keys = jnp.zeros((B, T, N, S)), jnp.zeros((B, S, N, S))
    value = jnp.broadcast_to(jnp.eye(S)[None, :, None, :], (B, S, N, S))
    context = attention_fn(implementation=implementation)(
        query,
        keys,
        value,
        dropout_rng=key,
        dropout_rate=0.25,
        broadcast_dropout=broadcast,
        deterministic=deterministic,
    )
    return S * context.swapaxes(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_broadcast_dropout_drops_the_same_everywhere(make):
    factors = what_is_dropped(make(0), True)
    is_close(np.unique(factors), np.array([0.0, 4 / 3]))
    np.testing.assert_array_equal(factors, jnp.broadcast_to(factors[:1, :1], factors.shape))
    assert (factors != what_is_dropped(make(1), True)).any()


@pytest.mark.slow
def test_broadcast_dropout_of_tiles():
    key = jax.random.key(0)
    is_close(what_is_dropped(key, True, implementation="tiled"), what_is_dropped(key, True))


def test_dropout_of_each_head_by_itself():
    factors = what_is_dropped(jax.random.key(0), False)
    different = {np.asarray(factor).tobytes() for factor in factors.reshape(B * N, -1)}
    assert len(different) == B * N
    assert abs((factors == 0).mean() - 0.25) < 0.08  # 280 weights: 3 standard deviations


def test_share_of_broadcast_dropout():
    factors = jnp.stack([what_is_dropped(jax.random.key(i), True)[0, 0] for i in range(12)])
    assert abs((factors == 0).mean() - 0.25) < 0.065  # 420 weights: 3 standard deviations


def test_deterministic_leaves_dropout_out():
    factors = what_is_dropped(None, True, deterministic=True)
    is_close(factors, jnp.ones_like(factors))


@pytest.mark.slow
def test_layers_with_dropout():
    """The layers really drop, by their own random streams; sown weights are those before."""
    options = {"dropout_rate": 0.5, "attention_fn": attention_fn()}
    layer = linen.MultiHeadDotProductAttention(N, **options)
    plain = linen.MultiHeadDotProductAttention(N)
    variables = compiled(plain.init, jax.random.key(0), X)
    rest, weights = plain.apply(variables, X, sow_weights=True, mutable="intermediates")
    is_close(layer.apply(variables, X, deterministic=True), rest)
    dropped, same_weights = layer.apply(
        variables,
        X,
        deterministic=False,
        rngs={"dropout": jax.random.key(1)},
        sow_weights=True,
        mutable="intermediates",
    )
    is_close(same_weights, weights)
    assert jnp.abs(dropped - rest).max() > 0.01

    twin = nnx.MultiHeadAttention(N, D, decode=False, rngs=nnx.Rngs(0), **options)
    assert jnp.abs(twin(X, deterministic=False) - twin(X, deterministic=True)).max() > 0.01


def linen_steps(x, length, **options):
    """Decode token by token with Linen's cache."""
    layer = linen.MultiHeadDotProductAttention(N, decode=True, **options)
    variables = compiled(layer.init, jax.random.key(0), jnp.zeros((B, length, D)))
    parameters, cache = variables["params"], variables["cache"]

    @jax.jit
    def step(cache, token):
        output, updates = layer.apply(
            {"params": parameters, "cache": cache}, token, mutable=["cache"]
        )
        return updates["cache"], output

    outputs = []
    for i in range(x.shape[1]):
        cache, output = step(cache, x[:, i : i + 1])
        outputs.append(output)
    return jnp.concatenate(outputs, axis=1), parameters


def nnx_steps(x, length, is_causal=False, **options):
    """Decode token by token with NNX's cache."""
    layer = nnx.MultiHeadAttention(N, D, decode=True, rngs=nnx.Rngs(0), **options)
    layer.init_cache((B, length, D))
    step = nnx.jit(lambda layer, token: layer(token, is_causal=is_causal))
    outputs = [step(layer, x[:, i : i + 1]) for i in range(x.shape[1])]
    return jnp.concatenate(outputs, axis=1), layer


@pytest.mark.slow
@pytest.mark.parametrize("steps", [linen_steps, nnx_steps])
def test_decoding_equals_flax(steps):
    is_close(steps(X, T + 2, attention_fn=attention_fn())[0], steps(X, T + 2)[0])


DECODING = {
    "window": {"mask": masks.Window(2, 0)},
    "array, bias per head": {
        "mask": np.tri(T + 2, dtype=bool) & ~np.tri(T + 2, k=-3, dtype=bool),
        "bias": ALIBI,
    },
    "array as bias": {"bias": normal(N, T + 2, T + 2)},
    "bias function, score with positions": {
        "bias": bind(slope_times_distance, slope=0.3),
        "score": bind(relative_key, table=normal(5, H)),
    },
    "score with positions per head": {"score": per_head(bind(relative_key, table=normal(N, 5, H)))},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODING)
def test_decoding_asks_bound_masks_and_biases_at_the_position(name):
    """Step by step with a cache longer than the sequence is one causal pass over it."""
    bound = DECODING[name]
    found, parameters = linen_steps(X, T + 2, attention_fn=attention_fn(decode=True, **bound))
    x = jnp.pad(X, ((0, 0), (0, 2), (0, 0)))
    whole = linen.MultiHeadDotProductAttention(N, attention_fn=attention_fn(**bound))
    expected = compiled(whole.apply, {"params": parameters}, x, mask=masks.Causal())
    is_close(found, expected[:, :T])


@pytest.mark.slow
def test_nnx_decoding_with_is_causal():
    """In Flax 0.12.8 itself is_causal hides all but the first key from a decoding step."""
    function = attention_fn(decode=True)
    found, layer = nnx_steps(X, T + 2, is_causal=True, attention_fn=function, num_kv_heads=2)
    whole = nnx.jit(lambda layer: layer(X, is_causal=True, decode=False))
    is_close(found, whole(layer))


def test_single_query_at_position_zero():
    function = attention_fn(mask=masks.Causal(), decode=False)
    context = compiled(function, QUERY[:, :1], KEY, VALUE)
    is_close(context, VALUE[:, :1])


ONE = QUERY[:, :1]
OCCUPIED = np.ones((B, 1, 1, S), bool)
ERRORS = {
    "the position of a single query among several keys is not known, and score, mask, bias or "
    "is_causal depends on it; give attention_fn decode=True if the layer decodes, decode=False": [
        ({"mask": masks.Causal()}, {"query": ONE}),
        ({"bias": ALIBI}, {"query": ONE, "mask": OCCUPIED}),
        ({"score": bind(relative_key, table=jnp.zeros((3, H)))}, {"query": ONE}),
        ({}, {"query": ONE, "is_causal": True}),
    ],
    "decode=True takes the position of the query from the mask of the layer's cache, and there is "
    "no such mask": [({"mask": masks.Causal(), "decode": True}, {"query": ONE})],
    "precision must be a jax.lax.Precision, its name, two of them or a "
    "jax.lax.DotAlgorithmPreset, got 'best'": [({}, {"precision": "best"})],
    "jax.lax.DotAlgorithmPreset, got ('high', 'TF32_TF32_F32')": [
        ({}, {"precision": ("high", "TF32_TF32_F32")})
    ],
    "query must be real, got complex64; attend to real and imaginary parts as features": [
        (
            {"score": scores.dot},
            {x: jnp.zeros((B, T, N, H), jnp.complex64) for x in ("query", "key", "value")},
        )
    ],
    "qk_attn_weights_einsum is not honoured; the products of tiles are not einsums": [
        ({}, {"qk_attn_weights_einsum": jnp.einsum})
    ],
    "attn_weights_value_einsum is not honoured": [({}, {"attn_weights_value_einsum": jnp.einsum})],
    "einsum_dot_general is not honoured": [({}, {"einsum_dot_general": jax.lax.dot_general})],
    "input_positions is not honoured; use attention_jax.nnx.MultiHeadAttention": [
        ({}, {"input_positions": np.arange(T)})
    ],
    "dropout_rate 0.5 needs a dropout_rng; give a jax.random key, or deterministic=True": [
        ({}, {"dropout_rate": 0.5})
    ],
    "dropout_rate must be in [0, 1), got 1.0": [
        ({}, {"dropout_rate": 1.0, "dropout_rng": jax.random.key(0)})
    ],
    "bias is bound as a function and passed as an array, which are not added": [
        ({"bias": ALIBI}, {"bias": jnp.zeros((T, S))})
    ],
    "mask must broadcast to [*batch, N, T, S] = (2, 4, 5, 7), got shape (5, 5)": [
        ({}, {"mask": np.ones((T, T), bool)}),
        ({"mask": np.ones((T, T), bool)}, {}),
    ],
    "bias must broadcast to [*batch, N, T, S] = (2, 4, 5, 7), got shape (1, 1, 1, 1, 1)": [
        ({}, {"bias": jnp.zeros((1, 1, 1, 1, 1))})
    ],
    "value must be [*batch, length, heads, depth] with the batch axes (2,) of query, got shape "
    "(7, 4, 3)": [({}, {"value": VALUE[0]})],
    "implementation 'tiled' never holds the weights": [
        ({"implementation": "tiled"}, {"module": nnx.Module()})
    ],
    "implementation must be None or one of": [({"implementation": "flash"}, {})],
    "score is the Flax module Linear, whose parameters the layer would not find and train": [
        ({"score": nnx.Linear(1, 1, rngs=nnx.Rngs(0))}, {})
    ],
    "normalizer is the Flax module Dense, whose parameters": [({"normalizer": linen.Dense(1)}, {})],
    "mask: expected a Mask, a boolean array or a function": [({"mask": 3}, {})],
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_say_what_is_wrong(text):
    for bound, passed in ERRORS[text]:
        operands = {"query": QUERY, "key": KEY, "value": VALUE} | passed
        with pytest.raises((ShapeError, ValueError, TypeError)) as raised:
            attention_fn(**bound)(**operands)
        assert text in str(raised.value)


PRECISIONS = {
    "HIGHEST": (jax.lax.Precision.HIGHEST, "highest", "float32", ("high", "highest")),
    "HIGH": (jax.lax.Precision.HIGH, (jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGH)),
    "DEFAULT": (None, "default", jax.lax.Precision.DEFAULT, "fastest"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_reaches_every_product(name):
    """The backward ones too, which are traced when the call is over."""
    attend_with = attention_fn(implementation="tiled", score=scores.cosine)
    for precision in PRECISIONS[name]:
        function = jax.jit(functools.partial(attend_with, precision=precision))
        gradients = jax.jit(jax.grad(lambda *x, f=function: f(*x).sum(), (0, 1, 2)))
        program = gradients.lower(QUERY, KEY, VALUE).as_text()
        products = re.findall(r"stablehlo.dot_general.*", program)
        # What looks for NaN multiplies by zero in the highest precision, whatever is asked for.
        ours = [product for product in products if not product.endswith("tensor<3xf32>")]
        assert len(ours) >= 6
        expected = {"HIGHEST"} if name == "HIGHEST" else {name, "HIGHEST"}
        found = {x for p in ours for x in re.findall(r"precision = \[(\w+), \w+\]", p)}
        assert found and found <= expected, (precision, found)

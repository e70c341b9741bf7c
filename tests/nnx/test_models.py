"""Ready models: each learns a tiny task; decoding and generating equal the full pass."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from attention_jax import masks, positions
from attention_jax.layers import embedding, generate
from attention_jax.nnx import (
    CausalDecoder,
    EncoderDecoder,
    LinearAttention,
    MultiHeadAttention,
    PatchEncoder,
    TokenEncoder,
)

PROMPT = jnp.array([[1, 5, 2, 7], [3, 3, 0, 6]])
LENGTHS = jnp.array([4, 2])
TYPES = jnp.array([[0, 1, 1, 0], [0, 1, 0, 0]])
TYPED = {"embedding_options": {"num_types": 2}}
INSIDE = functools.partial(
    MultiHeadAttention, position=positions.rotary, bias=positions.learned_buckets(8, 7)
)
KINDS = {
    "none": {},
    "learned": {"max_length": 8},
    "sinusoidal": {"position": functools.partial(positions.sinusoidal, depth=8)},
    "in the attention": {"attention": INSIDE},
    "linear": {"attention": functools.partial(LinearAttention, position=positions.rotary)},
}


def learn(model, loss, batch_of, steps=100, rate=1e-2):
    """Train on fresh batches; return what the loss says beside its value, first and last."""
    graph, params = nnx.split(model)
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, key):
        params, moments = carry

        def value(params):
            return loss(nnx.merge(graph, params, copy=True), *batch_of(key))

        (_, correct), gradient = jax.value_and_grad(value, has_aux=True)(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), correct

    @jax.jit
    def train(params, key):
        carry, correct = jax.lax.scan(
            step, (params, optimizer.init(params)), jax.random.split(key, steps)
        )
        return carry[0], correct

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params, correct = train(params, jax.random.key(1))
    nnx.update(model, params)
    return correct[0], correct[-1]


def scored(logits, targets):
    """Return the cross-entropy, and the share of targets that are the most likely."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return loss.mean(), jnp.mean(logits.argmax(-1) == targets)


def words(key, length, batch=64):
    return jax.random.randint(key, (batch, length), 1, 9)


@pytest.mark.slow
def test_an_encoder_learns_to_reverse():
    """Each token is said where its mirror image stands: positions, and both directions."""
    model = TokenEncoder(
        9, 32, num_heads=2, num_layers=1, max_length=6, norm_placement="before", rngs=nnx.Rngs(0)
    )

    def batch_of(key):
        tokens = words(key, 6)
        return tokens, tokens[:, ::-1]

    first, last = learn(model, lambda model, x, y: scored(model(x), y), batch_of)
    assert first < 0.3 and last > 0.95, (first, last)


@pytest.mark.slow
def test_a_decoder_learns_to_go_on():
    """Every token is the one before and one more, after a start that differs."""
    model = CausalDecoder(9, 16, num_heads=2, num_layers=1, max_length=8, rngs=nnx.Rngs(0))

    def batch_of(key):
        start = jax.random.randint(key, (32, 1), 0, 9)
        tokens = (start + jnp.arange(8)[None]) % 9
        return tokens[:, :-1], tokens[:, 1:]

    first, last = learn(model, lambda model, x, y: scored(model(x), y), batch_of)
    assert first < 0.4 and last > 0.95, (first, last)
    generated = jax.jit(lambda prompt: model.generate(prompt, 4))(jnp.array([[2, 3], [6, 7]]))
    np.testing.assert_array_equal(generated, [[4, 5, 6, 7], [8, 0, 1, 2]])


@pytest.mark.slow
def test_an_encoder_decoder_learns_to_reverse_a_source_of_any_length():
    model = EncoderDecoder(
        9, 9, features=32, num_heads=2, num_layers=1, norm_placement="before", rngs=nnx.Rngs(0)
    )

    def batch_of(key):
        source = words(key, 5)
        length = jax.random.randint(key, (len(source),), 3, 6)
        at = (length[:, None] - 1 - jnp.arange(5)[None]) % 5
        target = jnp.take_along_axis(source, at, axis=1)
        return source, target, length

    def loss(model, source, target, length):
        begun = jnp.pad(target, ((0, 0), (1, 0)))[:, :-1]
        logits = model(source, begun, masks.Lengths(length))
        return scored(logits[:, :3], target[:, :3])

    first, last = learn(model, loss, batch_of, steps=250)
    assert first < 0.3 and last > 0.95, (first, last)
    source, length = jnp.array([[1, 2, 3, 4, 5], [1, 2, 3, 8, 8]]), jnp.array([5, 3])
    generate = jax.jit(lambda source, mask: model.generate(source, jnp.zeros((2, 1), int), 3, mask))
    generated = generate(source, masks.Lengths(length))
    np.testing.assert_array_equal(generated, [[5, 4, 3], [3, 2, 1]])


@pytest.mark.slow
def test_an_encoder_of_patches_learns_where_the_light_is():
    model = PatchEncoder(
        (8, 8),
        4,
        num_channels=1,
        num_classes=4,
        features=16,
        num_heads=2,
        num_layers=1,
        rngs=nnx.Rngs(0),
    )

    def batch_of(key):
        patch, pixel, noise = jax.random.split(key, 3)
        corner = jax.random.randint(patch, (32,), 0, 4)
        at = jax.random.randint(pixel, (2, 32), 0, 4)
        images = 0.1 * jax.random.normal(noise, (32, 8, 8, 1))
        rows, columns = corner // 2 * 4 + at[0], corner % 2 * 4 + at[1]
        return images.at[jnp.arange(32), rows, columns, 0].set(3.0), corner

    first, last = learn(model, lambda model, x, y: scored(model(x), y), batch_of)
    assert first < 0.5 and last > 0.95, (first, last)


@pytest.mark.slow
def test_nothing_comes_from_the_future():
    model = CausalDecoder(9, 8, num_heads=2, num_layers=1, max_length=9, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, tokens: model(tokens))
    logits, changed = run(model, PROMPT), run(model, PROMPT.at[:, 2].set(8))
    np.testing.assert_array_equal(logits[:, :2], changed[:, :2])
    assert np.all(np.any(logits[:, 2:] != changed[:, 2:], axis=-1))


def drawn_anew(model):
    """Draw all parameters far from where training begins, so that every one counts."""
    keys = nnx.Rngs(1)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda p: 0.5 * jax.random.normal(keys(), p.shape), params))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_decoding_with_a_cache_is_the_full_pass(kind):
    """Where every example has its own length, for every kind of position."""
    model = drawn_anew(CausalDecoder(9, 8, num_heads=2, num_layers=2, **kind, rngs=nnx.Rngs(0)))
    following = jnp.array([[4, 8], [5, 1]])

    whole = jnp.pad(PROMPT, ((0, 0), (0, 2)))
    at = jnp.arange(2)[:, None], LENGTHS[:, None] + jnp.arange(2)[None]

    @nnx.jit
    def run(model):
        first, caches = model.decode(PROMPT, model.init_cache(2, 6, ragged=True), count=LENGTHS)
        second, caches = model.decode(following[:, :1], caches)
        third, _ = model.decode(following[:, 1:], caches)
        return first, jnp.concatenate([second, third], axis=1), model(whole.at[at].set(following))

    of_prompt, of_following, full = run(model)
    for n, length in enumerate(LENGTHS):
        chex.assert_trees_all_close(of_prompt[n, :length], full[n, :length], atol=1e-5)
    chex.assert_trees_all_close(of_following, full[at], atol=1e-5)


@pytest.mark.slow
def test_generation_draws_from_what_the_full_pass_says():
    """What is written has the type of the prompt's last token."""
    sizes = {"num_heads": 2, "num_layers": 1, "max_length": 8}
    model = drawn_anew(CausalDecoder(9, 8, **sizes, **TYPED, rngs=nnx.Rngs(0)))
    options = {"lengths": LENGTHS, "rng": jax.random.key(2), "types": TYPES}
    run = nnx.jit(lambda model: model.generate(PROMPT, 4, **options))
    generated = np.asarray(run(model))
    assert len(np.unique(generated)) > 2
    tokens, types = np.zeros((2, 8), int), np.zeros((2, 8), int)
    for n, length in enumerate(LENGTHS):
        tokens[n, : length + 4] = np.concatenate([PROMPT[n, :length], generated[n]])
        types[n, : length + 4] = np.append(TYPES[n, :length], 4 * [TYPES[n, length - 1]])
    logits = nnx.jit(lambda model: model(tokens, types=types))(model)
    for step in range(4):
        of_step = logits[jnp.arange(2), LENGTHS - 1 + step]
        drawn = jax.random.categorical(jax.random.fold_in(options["rng"], step), of_step)
        np.testing.assert_array_equal(drawn, generated[:, step])


@pytest.mark.slow
def test_an_encoder_decoder_decodes_as_it_trains():
    sizes = {"features": 8, "num_heads": 2, "num_layers": 1}
    model = drawn_anew(EncoderDecoder(9, 9, **sizes, **TYPED, rngs=nnx.Rngs(0)))
    seen = masks.Lengths(LENGTHS)

    @nnx.jit
    def run(model):
        memory = model.keys(model.encode(PROMPT, seen, types=TYPES))
        caches, decoded = model.init_cache(2, 4, ragged=True), []
        for piece in (slice(3), slice(3, 4)):
            own = {"source_mask": seen, "types": 1 - TYPES[:, piece]}
            logits, caches = model.decode(PROMPT[:, piece], caches, memory, **own)
            decoded.append(logits)
        spoiled = PROMPT.at[1, 2:].set(8)
        return jnp.concatenate(decoded, axis=1), *(
            model(x, PROMPT, seen, source_types=TYPES, types=1 - TYPES) for x in (PROMPT, spoiled)
        )

    decoded, full, spoiled = run(model)
    chex.assert_trees_all_close(decoded, full, atol=1e-5)
    np.testing.assert_array_equal(spoiled, full)


@pytest.mark.slow
def test_tokens_are_drawn_with_a_key():
    odds = jnp.log(jnp.array([0.5, 0.3, 0.2]))

    def decode(tokens, caches, count):
        return jnp.broadcast_to(odds, (*tokens.shape, 3)), caches

    prompt = jnp.zeros((500, 2), jnp.int32)
    draw = functools.partial(generate, decode, (), prompt, 8)
    drawn = draw(rng=jax.random.key(0))
    share = np.bincount(np.ravel(drawn), minlength=3) / 4000
    np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=0.03)
    squared = np.bincount(np.ravel(draw(rng=jax.random.key(0), temperature=0.5))) / 4000
    np.testing.assert_allclose(squared, np.array([25, 9, 4]) / 38, atol=0.03)
    np.testing.assert_array_equal(drawn, draw(rng=jax.random.key(0)))
    assert len({tuple(row) for row in np.asarray(drawn)}) > 300
    assert not np.any(draw())


@pytest.mark.slow
def test_a_temperature_may_be_known_only_inside_jit():
    odds = jnp.log(jnp.array([0.5, 0.3, 0.2]))

    def draw(temperature):
        def decode(tokens, caches, count):
            return jnp.broadcast_to(odds, (*tokens.shape, 3)), caches

        prompt, key = jnp.zeros((50, 2), jnp.int32), jax.random.key(0)
        return generate(decode, (), prompt, 3, rng=key, temperature=temperature)

    np.testing.assert_array_equal(jax.jit(draw)(0.5), draw(0.5))
    np.testing.assert_array_equal(jax.jit(draw)(2), draw(np.int64(2)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32])
def test_prompts_of_any_integers_and_lengths_in_a_list(dtype):
    model = CausalDecoder(100, 8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, prompt: model.generate(prompt, 2, lengths=[4, 2]))
    drawn = run(model, PROMPT.astype(dtype))
    assert drawn.dtype == dtype
    np.testing.assert_array_equal(drawn, run(model, PROMPT).astype(dtype))


def test_patches_are_squares_row_by_row():
    images = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    cut = embedding.patches(images, 2)
    for n in range(6):
        row, column = n // 3 * 2, n % 3 * 2
        square = images[:, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(cut[:, n], square.reshape(2, -1))


@pytest.mark.slow
def test_weights_come_with_the_logits():
    model = EncoderDecoder(9, 9, features=8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0))
    run = nnx.jit(lambda model, *tokens: model(*tokens, return_weights=True))
    logits, (weights,) = run(model, PROMPT, PROMPT[:, :3])
    assert logits.shape == (2, 3, 9)
    written, _ = nnx.jit(EncoderDecoder.write, static_argnames="return_weights")(
        model, PROMPT, PROMPT[:, :3], return_weights=True
    )
    chex.assert_trees_all_close(model.target.attend(written[:, 1]), logits[:, 1], atol=1e-5)
    assert weights.attention.shape == (2, 2, 3, 3) and weights.cross_attention.shape == (2, 2, 3, 4)


@pytest.mark.slow
def test_packed_documents_stand_where_each_begins():
    model = TokenEncoder(9, 8, num_heads=2, num_layers=1, max_length=5, rngs=nnx.Rngs(0))
    documents = masks.Segment(jnp.array([[0, 0, 0, 0], [0, 0, 1, 1]]))
    at = jnp.array([[0, 1, 2, 3], [0, 1, 0, 1]])
    run = nnx.jit(lambda model: (model(PROMPT, documents, positions=at), model(PROMPT[1:, 2:])))
    packed, alone = run(model)
    chex.assert_trees_all_close(packed[1:, 2:], alone, atol=1e-5)


@pytest.mark.slow
def test_bad_arguments_are_explained():
    model = CausalDecoder(9, 8, num_heads=2, num_layers=1, max_length=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"positions: 6 tokens .* has 5 positions; .* max_length"):
        model(jnp.zeros((1, 6), int))
    with pytest.raises(ValueError, match=r"positions: 7 tokens were given"):
        model.generate(PROMPT, 4)
    with pytest.raises(ValueError, match=r"generate: num_steps must be 1 or more, got 0"):
        model.generate(PROMPT[:, :1], 0)
    with pytest.raises(ValueError, match=r"generate: temperature must be positive, got 0"):
        model.generate(PROMPT[:, :1], 1, temperature=0)
    with pytest.raises(ValueError, match=r"generate: uint8 cannot hold all of the 300 tokens"):
        CausalDecoder(300, 8, num_heads=2, num_layers=1, rngs=nnx.Rngs(0)).generate(
            PROMPT.astype(jnp.uint8), 1
        )
    with pytest.raises(ValueError, match=r"give a position, or max_length = 5 .* not both"):
        CausalDecoder(
            9,
            8,
            num_heads=2,
            num_layers=1,
            max_length=5,
            position=positions.sinusoidal,
            rngs=nnx.Rngs(0),
        )
    with pytest.raises(ValueError, match=r"patches: the width must be a multiple of .* 6 and .* 4"):
        PatchEncoder(
            (8, 6),
            4,
            num_channels=3,
            num_classes=10,
            features=8,
            num_heads=2,
            num_layers=1,
            rngs=nnx.Rngs(0),
        )
    vision = PatchEncoder(
        (8, 8),
        4,
        num_channels=3,
        num_classes=10,
        features=8,
        num_heads=2,
        num_layers=1,
        rngs=nnx.Rngs(0),
    )
    with pytest.raises(ValueError, match=r"axis S .* of patches \[B, S, D\] must be 5 .* got 7"):
        vision(jnp.zeros((1, 8, 12, 3)))

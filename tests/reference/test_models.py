"""Published models: ours give the values and the greedy tokens of other people's code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from tests.reference import builds

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

TOKENS = np.array([[5, 9, 2, 30, 14, 7, 7, 21], [3, 3, 11, 36, 8, 1, 19, 4]])
LENGTHS = np.array([8, 5])
STEPS = 6


@pytest.fixture(autouse=True)
def float64(x64, monkeypatch):
    """Compare in float64, where both sides would compute norms and softmax in float32.

    Norms of Flax, and casts of indices, rely on implicit promotion.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def tensor(x):
    return torch.from_numpy(np.array(x))


def close(ours, other, tolerance=1e-12):
    difference = np.abs(np.asarray(ours) - other.detach().numpy()).max()
    assert np.asarray(ours).dtype == np.float64
    assert difference < tolerance * max(1.0, np.abs(np.asarray(ours)).max()), difference


DECODERS = {
    "gpt2": (builds.gpt2, None, None),
    "llama": (builds.llama, None, None),
    "mistral": (builds.mistral, builds.MISTRAL_MASK, 3),
    "gemma2": (builds.gemma2, builds.GEMMA2_MASK, None),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name):
    build, mask, window = DECODERS[name]
    other, ours = build()
    with torch.no_grad():
        close(nnx.jit(lambda ours: ours(TOKENS, mask))(ours), other(tensor(TOKENS)).logits)
        expected = other.generate(
            tensor(TOKENS), do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS
        )
    options = {"mask": mask, "window": window}
    generated = nnx.jit(lambda ours: ours.generate(TOKENS, STEPS, **options))(ours)
    np.testing.assert_array_equal(generated, expected[:, TOKENS.shape[1] :].numpy())
    assert len(np.unique(generated)) > 1


def test_gradients_of_gpt2():
    """Of the mean loss over the next tokens, by every parameter."""
    other, ours = builds.gpt2()
    tokens = tensor(TOKENS)
    other(tokens, labels=tokens).loss.backward()

    @nnx.jit
    @nnx.grad
    def gradient(ours):
        logits = jax.nn.log_softmax(ours(TOKENS)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, jnp.asarray(TOKENS)[:, 1:, None], axis=-1))

    named = {name: p.grad for name, p in other.named_parameters()}
    expected = builds.gpt2_parameters(named, builds.N)
    found = nnx.to_pure_dict(gradient(ours))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), found, expected
    )


def test_bert():
    other, ours = builds.bert()
    types, seen = (TOKENS % 2), np.arange(8) < LENGTHS[:, None]
    with torch.no_grad():
        expected = other(
            tensor(TOKENS), attention_mask=tensor(seen), token_type_ids=tensor(types)
        ).last_hidden_state
    run = nnx.jit(lambda ours: ours.encode(TOKENS, masks.Lengths(LENGTHS), types=types))
    close(run(ours)[0], expected[0])
    close(run(ours)[1, :5], expected[1, :5])


def test_t5():
    other, ours = builds.t5()
    seen = np.arange(8) < LENGTHS[:, None]
    target = np.array([[0, 4, 17, 30, 2], [0, 9, 9, 1, 12]])
    with torch.no_grad():
        of_source = {"input_ids": tensor(TOKENS), "attention_mask": tensor(seen)}
        expected = other(**of_source, decoder_input_ids=tensor(target)).logits
        written = other.generate(
            **of_source, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS
        )
    mask = masks.Lengths(LENGTHS)
    close(nnx.jit(lambda ours: ours(TOKENS, target, mask))(ours), expected)
    begin = np.zeros((2, 1), int)
    generated = nnx.jit(lambda ours: ours.generate(TOKENS, begin, STEPS, mask))(ours)
    np.testing.assert_array_equal(generated, written[:, 1:].numpy())

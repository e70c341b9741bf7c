"""Models that read one sequence and write another: values, gradients and greedy tokens."""

import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from tests.reference import translators
from tests.reference import trees_of_translators as trees
from tests.reference.sizes import LAYERS, WORDS, D, N

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
comparing = pytest.importorskip("tests.reference.comparing")
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

TOKENS = np.array([[5, 9, 2, 30, 14, 7, 7, 21], [3, 3, 11, 36, 8, 1, 19, 4]])
LENGTHS = np.array([8, 5])
TARGET = np.array([[2, 4, 17, 30, 2], [2, 9, 9, 1, 12]])
STEPS = 6
SEEDS = {"BART": 38, "Whisper": 2}  # whose greedy tokens are not all the same
OF_OTHERS = {
    "vocab_size": WORDS,
    "d_model": D,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": N,
    "decoder_attention_heads": N,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "decoder_start_token_id": 2,
    "attn_implementation": "eager",
}
LONGEST = {"max_position_embeddings": 32}
MODELS = {
    "BART": ("Bart", {"forced_eos_token_id": None}, translators.bart, trees.bart),
    "M2M-100": ("M2M100", {}, translators.m2m, trees.m2m),
}


def agree(name, model, ours, parameters, source, read, mask):
    """Compare values, gradients and the greedy tokens of full passes of the other.

    `source` are their keywords for what is read, `read` is ours.
    """
    other = comparing.drawn(model, SEEDS.get(name, 0))

    def logits(target):
        return other(**source, decoder_input_ids=comparing.tensor(target)).logits

    run = lambda ours: ours(read, TARGET, mask)  # noqa: E731
    comparing.agree(name, other, ours, parameters, lambda: logits(TARGET), run)
    expected = TARGET[:, :1]
    with torch.no_grad():
        for _ in range(STEPS):
            best = logits(expected)[:, -1].argmax(-1).numpy()
            expected = np.concatenate([expected, best[:, None]], axis=1)
    begin = TARGET[:, :1]
    generated = nnx.jit(lambda ours: ours.generate(read, begin, STEPS, mask))(ours)
    np.testing.assert_array_equal(generated, expected[:, 1:])
    assert len(np.unique(generated)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_translators(name):
    kind, options, build, parameters = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**OF_OTHERS, **LONGEST, **options)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    seen = comparing.tensor(np.arange(8) < LENGTHS[:, None])
    source = {"input_ids": comparing.tensor(TOKENS), "attention_mask": seen}
    agree(name, model, build(), parameters, source, TOKENS, masks.Lengths(LENGTHS))


def test_whisper():
    """Its positions of the sound are sinusoids, which it keeps as an array and does not learn."""
    config = transformers.WhisperConfig(
        **OF_OTHERS, num_mel_bins=3, max_source_positions=6, max_target_positions=32
    )
    model = transformers.WhisperForConditionalGeneration(config)
    sound = np.random.default_rng(0).standard_normal((2, 12, 3))
    source = {"input_features": comparing.tensor(sound.transpose(0, 2, 1))}
    agree("Whisper", model, translators.whisper(), trees.whisper, source, sound, None)

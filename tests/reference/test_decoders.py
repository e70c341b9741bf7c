"""Models that write: values, gradients and greedy tokens of other people's code."""

import functools

import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from tests.reference import decoders, trees
from tests.reference.sizes import LAYERS, WORDS, D, K, N

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
comparing = pytest.importorskip("tests.reference.comparing")
pytestmark = pytest.mark.slow

TOKENS = np.array([[5, 9, 2, 30, 14, 7, 7, 21], [3, 3, 11, 36, 8, 1, 19, 4]])
LENGTHS = np.array([8, 5])
STEPS = 6
OF_OTHERS = {
    "vocab_size": WORDS,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": N,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA = {
    **OF_OTHERS,
    "num_key_value_heads": K,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
DEEPSEEK = {
    **LLAMA,
    "num_key_value_heads": N,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": 6,
    "kv_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 3,
    "v_head_dim": 3,
    "first_k_dense_replace": LAYERS,
}
MODELS = {
    "GPT-2": ("GPT2", {**OF_OTHERS, "n_positions": 64}, decoders.gpt2, trees.gpt2),
    "Llama": ("Llama", LLAMA, decoders.llama, trees.llama),
    "Mistral": ("Mistral", {**LLAMA, "sliding_window": 4}, decoders.llama, trees.llama),
    "Qwen3": (
        "Qwen3",
        {**LLAMA, "head_dim": 6},
        decoders.qwen3,
        functools.partial(trees.llama, attention=trees.attention_of_qwen3),
    ),
    "Gemma 2": (
        "Gemma2",
        {**LLAMA, "head_dim": 6, "query_pre_attn_scalar": 5, "sliding_window": 4},
        decoders.gemma2,
        trees.gemma2,
    ),
    "GPT-OSS": (
        "GptOss",
        {
            **LLAMA,
            "head_dim": 12,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "experts_implementation": "eager",
        },
        decoders.gpt_oss,
        functools.partial(
            trees.llama, attention=trees.attention_of_gpt_oss, feed_forward=trees.experts
        ),
    ),
    "DeepSeek": (
        "DeepseekV3",
        DEEPSEEK,
        decoders.deepseek,
        functools.partial(trees.llama, attention=trees.attention_of_deepseek),
    ),
    "DiffLlama": (
        "DiffLlama",
        LLAMA,
        decoders.diffllama,
        functools.partial(trees.llama, attention=trees.attention_of_diffllama),
    ),
}
MASKS = {
    "Mistral": decoders.LOCAL,
    "Gemma 2": decoders.EVERY_OTHER,
    "GPT-OSS": decoders.EVERY_OTHER,
}
WINDOWS = {"Mistral": 3}
SEEDS = {"GPT-2": 2, "Gemma 2": 5}  # whose greedy tokens are not all the same


def compare(name, kind, options, build, parameters, mask=None, seed=0, window=None):
    """Compare values, gradients and greedy tokens of a decoder."""
    text = "Text" if kind in ("Gemma3", "Llama4") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**options)
    causal = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    other = getattr(transformers, f"{kind}{causal}")(config)
    other = comparing.drawn(other, seed)
    ours, tokens = build(), comparing.tensor(TOKENS)
    comparing.agree(
        name, other, ours, parameters, lambda: other(tokens).logits, lambda x: x(TOKENS, mask)
    )
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with torch.no_grad():
        expected = other.generate(tokens, **options)[:, TOKENS.shape[1] :]
    kept = {"mask": mask, "window": window}
    generated = nnx.jit(lambda ours: ours.generate(TOKENS, STEPS, **kept))(ours)
    np.testing.assert_array_equal(generated, expected.numpy())
    assert len(np.unique(generated)) > 1


@pytest.mark.parametrize("name", MODELS)
def test_decoders(name):
    compare(name, *MODELS[name], MASKS.get(name), SEEDS.get(name, 0), WINDOWS.get(name))


def test_t5():
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=D,
        d_kv=6,
        d_ff=24,
        num_layers=LAYERS,
        num_heads=N,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0,
    )
    other = comparing.drawn(transformers.T5ForConditionalGeneration(config))
    ours, mask = decoders.t5(), masks.Lengths(LENGTHS)
    target = np.array([[0, 4, 17, 30, 2], [0, 9, 9, 1, 12]])
    seen = comparing.tensor(np.arange(8) < LENGTHS[:, None])
    source = {"input_ids": comparing.tensor(TOKENS), "attention_mask": seen}
    comparing.agree(
        "T5",
        other,
        ours,
        trees.t5,
        lambda: other(**source, decoder_input_ids=comparing.tensor(target)).logits,
        lambda ours: ours(TOKENS, target, mask),
    )
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS}
    with torch.no_grad():
        written = other.generate(**source, **options)
    begin = np.zeros((2, 1), int)
    generated = nnx.jit(lambda ours: ours.generate(TOKENS, begin, STEPS, mask))(ours)
    np.testing.assert_array_equal(generated, written[:, 1:].numpy())

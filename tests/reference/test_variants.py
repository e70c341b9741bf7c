"""Decoders that differ from Llama: values, gradients and greedy tokens of other people's code."""

from typing import Any, NamedTuple

import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from tests.reference import trees_of_variants as trees
from tests.reference import variants
from tests.reference.sizes import LAYERS, D, N

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
comparing = pytest.importorskip("tests.reference.comparing")
decoders = pytest.importorskip("tests.reference.test_decoders")
pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

LLAMA = {**decoders.LLAMA, "tie_word_embeddings": False}
TIED = {**LLAMA, "tie_word_embeddings": True}
PLAIN = {**decoders.OF_OTHERS, "intermediate_size": 24, "max_position_embeddings": 64}


class Model(NamedTuple):
    """The name of their class, their options, our recipe, our parameters, and the mask."""

    kind: str
    options: dict[str, Any]
    build: Any
    parameters: Any
    mask: Any = None
    seed: int = 0


def rope(**options):
    return {"rope_theta": 10_000.0, "rope_type": "default", **options}


TYPES = ["sliding_attention", "full_attention"]
MODELS = {
    "Gemma 3": Model(
        "Gemma3",
        {
            **TIED,
            "head_dim": 6,
            "query_pre_attn_scalar": 5,
            "sliding_window": 4,
            "layer_types": TYPES,
            "rope_parameters": {
                TYPES[0]: rope(),
                TYPES[1]: rope(rope_theta=1e6, rope_type="linear", factor=8.0),
            },
        },
        variants.gemma3,
        trees.gemma3,
        variants.LOCAL,
    ),
    "Phi-3": Model(
        "Phi3",
        {
            **LLAMA,
            "original_max_position_embeddings": 4,
            "rope_parameters": rope(
                rope_type="longrope",
                short_factor=[1.0, 1.0],
                long_factor=[1.5, 3.0],
                original_max_position_embeddings=4,
            ),
        },
        variants.phi3,
        trees.phi3,
    ),
    "OLMo 2": Model("Olmo2", LLAMA, variants.olmo2, trees.olmo2),
    "StableLM": Model(
        "StableLm",
        {
            **LLAMA,
            "use_qkv_bias": True,
            "rope_parameters": rope(partial_rotary_factor=0.5),
        },
        variants.stablelm,
        trees.stablelm,
    ),
    "Granite": Model(
        "Granite",
        {
            **LLAMA,
            "embedding_multiplier": 5.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.3,
            "logits_scaling": 3.0,
        },
        variants.granite,
        trees.granite,
    ),
    "Llama 3.1": Model(
        "Llama",
        {
            **LLAMA,
            "max_position_embeddings": 256,
            "rope_parameters": rope(
                rope_type="llama3",
                rope_theta=500.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
        variants.llama3,
        trees.granite,
    ),
    "Llama 4": Model(
        "Llama4",
        {
            **LLAMA,
            "head_dim": 4,
            "intermediate_size_mlp": 24,
            "moe_layers": [],
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 4,
            "floor_scale": 4,
            "attn_scale": 0.5,
            "rope_parameters": rope(),
        },
        variants.llama4,
        trees.llama4,
        variants.CHUNKS,
    ),
    "SmolLM3": Model(
        "SmolLM3",
        {**TIED, "no_rope_layers": [1, 0], "rope_parameters": rope()},
        variants.smollm3,
        trees.smollm3,
    ),
    "Cohere": Model(
        "Cohere",
        {**TIED, "logit_scale": 0.5, "rope_parameters": rope()},
        variants.cohere,
        trees.cohere,
    ),
    "Falcon": Model(
        "Falcon",
        {**PLAIN, "ffn_hidden_size": 24, "layer_norm_epsilon": 1e-5},
        variants.falcon,
        trees.falcon,
    ),
    "GPT-NeoX": Model(
        "GPTNeoX",
        {**PLAIN, "rope_parameters": rope(partial_rotary_factor=0.5)},
        variants.neox,
        trees.neox,
        seed=1,
    ),
    "BLOOM": Model(
        "Bloom",
        {
            **decoders.OF_OTHERS,
            "n_layer": LAYERS,
            "n_head": N,
            "hidden_size": D,
        },
        variants.bloom,
        trees.bloom,
        seed=6,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_variants(name):
    decoders.compare(name, *MODELS[name])


def test_a_prefix_language_model():
    """The first three tokens of each prompt see each other."""
    tokens, mask = decoders.TOKENS, masks.Prefix(3) | masks.Causal()
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    other, ours = comparing.drawn(other, 1), decoders.decoders.llama()

    def logits(tokens):
        length = tokens.shape[1]
        seen = comparing.tensor(mask.to_dense(length, length))[None, None]
        added = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        return other(comparing.tensor(tokens), attention_mask=added).logits

    comparing.agree(
        "prefix LM",
        other,
        ours,
        decoders.trees.llama,
        lambda: logits(tokens),
        lambda x: x(tokens, mask, causal=False),
    )
    expected = tokens
    with torch.no_grad():
        for _ in range(decoders.STEPS):
            best = logits(expected)[:, -1].argmax(-1).numpy()
            expected = np.concatenate([expected, best[:, None]], axis=1)
    options = {"mask": mask, "causal": False}
    run = nnx.jit(lambda ours: ours.generate(tokens, decoders.STEPS, **options))
    np.testing.assert_array_equal(run(ours), expected[:, tokens.shape[1] :])

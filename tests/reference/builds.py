"""Published models at toy size: Hugging Face's, and ours in the lines that a user writes.

Each function returns the other's model, ours, and our parameters made of the other's.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from attention_jax import masks, positions, scores
from attention_jax.interop import bert_parameters, gpt2_parameters
from attention_jax.interop.weights import StateDict, from_heads, to_heads
from attention_jax.layers import by_layer
from attention_jax.nnx import (
    CausalDecoder,
    EncoderDecoder,
    FeedForward,
    MultiHeadAttention,
    TokenEncoder,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WORDS, D, N, K, LAYERS = 37, 16, 4, 2, 2
SIZES = {"num_heads": N, "num_layers": LAYERS, "param_dtype": jnp.float64}
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
LLAMA_LIKE = {
    **OF_OTHERS,
    "num_key_value_heads": K,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
layer_norm = functools.partial(nnx.LayerNorm, use_fast_variance=False)
rms_norm = functools.partial(nnx.RMSNorm, epsilon=1e-5)
plain = functools.partial(FeedForward, use_bias=False)
gated = functools.partial(plain, gated=True)
grouped = functools.partial(
    MultiHeadAttention,
    num_key_heads=K,
    use_bias=False,
    position=functools.partial(positions.rotary, halves=True),
)
no_bias = functools.partial(nnx.Linear, use_bias=False)


def drawn(model):
    """Draw every parameter at random, in float64."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator).double())
    return model


def loaded(model, tree):
    """Give our model its parameters: every one of them, in its shape."""
    state = nnx.state(model, nnx.Param)
    own = jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    assert own == jax.tree.map(jnp.shape, tree)
    nnx.update(model, nnx.State(jax.tree.map(jnp.asarray, tree)))
    return model


def gpt2():
    config = transformers.GPT2Config(
        **OF_OTHERS, n_embd=D, n_head=N, n_layer=LAYERS, n_positions=64
    )
    other = drawn(transformers.GPT2LMHeadModel(config))
    norm = functools.partial(layer_norm, epsilon=1e-5)
    ours = CausalDecoder(WORDS, D, **SIZES, max_length=64, norm=norm, rngs=nnx.Rngs(0))
    return other, loaded(ours, gpt2_parameters(other.state_dict(), N))


def bert():
    config = transformers.BertConfig(**OF_OTHERS, intermediate_size=24, max_position_embeddings=64)
    other = drawn(transformers.BertModel(config))
    norm = functools.partial(layer_norm, epsilon=1e-12)
    ours = TokenEncoder(
        WORDS,
        D,
        **SIZES,
        max_length=64,
        hidden_features=24,
        norm=norm,
        embedding_options={"num_types": 2, "norm": norm},
        rngs=nnx.Rngs(0),
    )
    return other, loaded(ours, bert_parameters(other.state_dict(), N))


def llama_parameters(other, norms, offset=0.0):
    """Return our parameters of a model shaped like Llama; `norms` are its norms by our names."""
    state = StateDict("llama", other.state_dict(), "model.")
    stack = {"norm": {"scale": offset + state["norm.weight"]}}
    for n in range(LAYERS):
        kernel = lambda name, n=n: {"kernel": state[f"layers.{n}.{name}.weight"].T}  # noqa: E731
        heads = {"query": ("q", N), "key": ("k", K), "value": ("v", K)}
        stack[f"block_{n}"] = {
            "attention": {
                **{
                    own: to_heads(kernel(f"self_attn.{name}_proj"), count)
                    for own, (name, count) in heads.items()
                },
                "out": from_heads(kernel("self_attn.o_proj"), N),
            },
            "feed_forward": {
                own: kernel(f"mlp.{name}_proj")
                for own, name in (("gate", "gate"), ("hidden", "up"), ("out", "down"))
            },
            **{
                own: {"scale": offset + state[f"layers.{n}.{name}.weight"]}
                for own, name in norms.items()
            },
        }
    tree = {"embedding": {"token": {"embedding": state["embed_tokens.weight"]}}, "stack": stack}
    if not other.config.tie_word_embeddings:
        tree["output"] = {"kernel": other.state_dict()["lm_head.weight"].numpy().T}
    return tree


BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}


def llama_like(other):
    ours = CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=grouped,
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.silu,
        norm=rms_norm,
        head=no_bias,
        rngs=nnx.Rngs(0),
    )
    return other, loaded(ours, llama_parameters(other, BEFORE))


def llama():
    return llama_like(drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE))))


def mistral():
    config = transformers.MistralConfig(**LLAMA_LIKE, sliding_window=4)
    return llama_like(drawn(transformers.MistralForCausalLM(config)))


MISTRAL_MASK = masks.Window(3, 0)  # 4 tokens, the query among them


def gemma2():
    config = transformers.Gemma2Config(
        **LLAMA_LIKE, head_dim=6, query_pre_attn_scalar=5, sliding_window=4
    )
    other = drawn(transformers.Gemma2ForCausalLM(config))
    score = scores.soft_capped(scores.scaled(scores.dot, 5**-0.5), 50.0)
    ours = CausalDecoder(
        WORDS,
        D,
        **SIZES,
        attention=functools.partial(grouped, query_depth=6, score=score),
        feed_forward=gated,
        hidden_features=24,
        activation=jax.nn.gelu,
        norm=rms_norm,
        norm_placement="both",
        embedding_options={"scale": D**0.5},
        logit_cap=30.0,
        rngs=nnx.Rngs(0),
    )
    norms = {
        "attention_norm": "input_layernorm",
        "attention_branch_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_branch_norm": "post_feedforward_layernorm",
    }
    return other, loaded(ours, llama_parameters(other, norms, offset=1.0))


GEMMA2_MASK = by_layer(lambda n: MISTRAL_MASK if n % 2 == 0 else None)


def t5():
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
    other = drawn(transformers.T5ForConditionalGeneration(config))
    attention = functools.partial(
        MultiHeadAttention, query_depth=6, use_bias=False, score=scores.dot
    )
    relative = functools.partial(positions.learned_buckets, 8, 12)
    ours = EncoderDecoder(
        WORDS,
        WORDS,
        features=D,
        **SIZES,
        position=None,
        attention=attention,
        cross_attention=attention,
        feed_forward=plain,
        hidden_features=24,
        norm=functools.partial(nnx.RMSNorm, epsilon=1e-6),
        norm_placement="before",
        embedding_options={"scale": 1.0},
        head=no_bias,
        encoder_options={"shared_bias": relative()},
        decoder_options={"shared_bias": relative(bidirectional=False)},
        rngs=nnx.Rngs(0),
    )
    return other, loaded(ours, t5_parameters(other))


def t5_parameters(other):
    state = StateDict("t5", other.state_dict(), "")
    token = {"token": {"embedding": state["shared.weight"]}}
    tree = {"source": token, "target": token, "output": {"kernel": state["lm_head.weight"].T}}
    for side, sublayers in (
        ("encoder", {"attention": "SelfAttention"}),
        ("decoder", {"attention": "SelfAttention", "cross_attention": "EncDecAttention"}),
    ):
        table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tree[side] = {
            "bias": {"table": state[table].T},
            "norm": {"scale": state[f"{side}.final_layer_norm.weight"]},
        }
        for n in range(LAYERS):
            block = tree[side][f"block_{n}"] = {}
            for at, (own, name) in enumerate(sublayers.items()):
                layer = f"{side}.block.{n}.layer.{at}"
                kernel = lambda x, at=f"{layer}.{name}": {"kernel": state[f"{at}.{x}.weight"].T}  # noqa: E731
                heads = {"query": "q", "key": "k", "value": "v"}
                block[own] = {x: to_heads(kernel(y), N) for x, y in heads.items()}
                block[own]["out"] = from_heads(kernel("o"), N)
                block[f"{own}_norm"] = {"scale": state[f"{layer}.layer_norm.weight"]}
            layer = f"{side}.block.{n}.layer.{len(sublayers)}"
            block["feed_forward"] = {
                own: {"kernel": state[f"{layer}.DenseReluDense.{name}.weight"].T}
                for own, name in (("hidden", "wi"), ("out", "wo"))
            }
            block["feed_forward_norm"] = {"scale": state[f"{layer}.layer_norm.weight"]}
    return tree

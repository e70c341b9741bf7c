"""Our parameters out of other people's state dicts, for the recipes of `variants`."""

import numpy as np

from attention_jax.interop import from_heads, to_heads
from tests.reference import trees
from tests.reference.sizes import LAYERS, D, K, N
from tests.reference.trees import State


def gemma3(state, offset=1.0):
    def attention(state, at):
        own = trees.attention_of_qwen3(state, at)
        return own | {x: {"scale": offset + own[x]["scale"]} for x in ("query_ln", "key_ln")}

    return trees.llama(state, offset, trees.BOTH, attention)


def split(state, name, sizes):
    """Return the linear layers that lie one after the other in one."""
    kernels = np.split(state[f"{name}.weight"].T, np.cumsum(sizes)[:-1], axis=1)
    return [{"kernel": kernel} for kernel in kernels]


def attention_of_phi3(state, at):
    heads, depth = (N, K, K), D // N
    parts = split(state, f"{at}.self_attn.qkv_proj", [depth * h for h in heads])
    parts = {
        name: to_heads(part, h)
        for name, part, h in zip(("query", "key", "value"), parts, heads, strict=True)
    }
    return {**parts, "out": state.out(f"{at}.self_attn.o_proj")}


def gated_of_phi3(state, at):
    gate, hidden = split(state, f"{at}.mlp.gate_up_proj", [24, 24])
    return {"gate": gate, "hidden": hidden, "out": state.kernel(f"{at}.mlp.down_proj")}


def phi3(state, offset=0.0):
    return trees.llama(state, attention=attention_of_phi3, feed_forward=gated_of_phi3)


def olmo2(state, offset=0.0):
    norms = {
        "attention_norm": "post_attention_layernorm",
        "feed_forward_norm": "post_feedforward_layernorm",
    }
    return untied(state, norms=norms, attention=trees.attention_of_qwen3)


def llama4(state, offset=0.0):
    def feed_forward(state, at):
        names = (("gate", "gate"), ("hidden", "up"), ("out", "down"))
        return {own: state.kernel(f"{at}.feed_forward.{name}_proj") for own, name in names}

    return trees.llama(state, feed_forward=feed_forward)


def granite(state, offset=0.0):
    return trees.llama(state)


def untied(state, **options):
    tree = tied(state, **options)
    return tree | {"output": {"kernel": np.asarray(state["lm_head.weight"]).T}}


def tied(
    state,
    norms=trees.BEFORE,
    attention=trees.attention_of_llama,
    feed_forward=trees.gated,
    prefix="model.",
    layers="layers",
    last="norm",
    token="embed_tokens",
):
    """Return the parameters of a decoder whose norms have biases where those of the other do."""
    state = State("variants", state, prefix)

    def norm(name):
        has_bias = f"{state.prefix}{name}.bias" in state.values
        return state.norm(name) if has_bias else {"scale": state[f"{name}.weight"]}

    stack = {"norm": norm(last)}
    for n in range(LAYERS):
        at = f"{layers}.{n}"
        stack[f"block_{n}"] = {
            "attention": attention(state, at),
            "feed_forward": feed_forward(state, at),
            **{own: norm(f"{at}.{name}") for own, name in norms.items()},
        }
    return {"embedding": {"token": {"embedding": state[f"{token}.weight"]}}, "stack": stack}


def stablelm(state, offset=0.0):
    return untied(state)


def smollm3(state, offset=0.0):
    return tied(state)


def cohere(state, offset=0.0):
    return tied(state, norms={"attention_norm": "input_layernorm"})


def interleaved(state, name, heads):
    """Return query, key and value, whose rows lie side by side head by head."""
    linear = state.layer(name)
    parts = to_heads(linear, heads)
    depth = D // N
    named = zip(("query", "key", "value"), range(3), strict=True)
    return {
        own: {x: array[..., n * depth : (n + 1) * depth] for x, array in parts.items()}
        for own, n in named
    }


def plain(first, second):
    def feed_forward(state, at):
        return {"hidden": state.layer(f"{at}.{first}"), "out": state.layer(f"{at}.{second}")}

    return feed_forward


def attention_of_falcon(state, at):
    depth = D // N
    name = f"{at}.self_attention"
    query, key, value = split(state, f"{name}.query_key_value", [D, depth, depth])
    parts = {"query": to_heads(query, N), "key": to_heads(key, 1), "value": to_heads(value, 1)}
    return {**parts, "out": state.out(f"{name}.dense")}


def falcon(state, offset=0.0):
    return tied(
        state,
        {"attention_norm": "input_layernorm"},
        attention_of_falcon,
        plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        prefix="transformer.",
        layers="h",
        last="ln_f",
        token="word_embeddings",
    )


def neox(state, offset=0.0):
    def attention(state, at):
        own = interleaved(state, f"{at}.attention.query_key_value", N)
        return {**own, "out": from_heads(state.layer(f"{at}.attention.dense"), N)}

    tree = tied(
        state,
        attention=attention,
        feed_forward=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        prefix="gpt_neox.",
        last="final_layer_norm",
        token="embed_in",
    )
    return tree | {"output": {"kernel": np.asarray(state["lm_head.weight"]).T}}


def bloom(state, offset=0.0):
    def attention(state, at):
        own = interleaved(state, f"{at}.self_attention.query_key_value", N)
        return {**own, "out": from_heads(state.layer(f"{at}.self_attention.dense"), N)}

    tree = tied(
        state,
        attention=attention,
        feed_forward=plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        prefix="transformer.",
        layers="h",
        last="ln_f",
        token="word_embeddings",
    )
    norm = State("bloom", state, "transformer.").norm("word_embeddings_layernorm")
    return tree | {"embedding": tree["embedding"] | {"norm": norm}}

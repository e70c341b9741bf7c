"""Our parameters out of other people's state dicts, by the names of Hugging Face.

Each function takes a state dict and returns the tree of one recipe. Gradients have the same names,
so the same function compares them; `offset` is what a norm adds to its scale, and so not theirs.
"""

import numpy as np

from attention_jax.interop import (
    StateDict,
    bert_parameters,
    from_heads,
    gpt2_parameters,
    to_heads,
)
from tests.reference.sizes import LAYERS, K, N


class State(StateDict):
    """A state dict, with the linear layers of a recipe that have no bias."""

    def kernel(self, name):
        return {"kernel": self[f"{name}.weight"].T}

    def layer(self, name):
        has_bias = f"{self.prefix}{name}.bias" in self.values
        return self.linear(name) if has_bias else self.kernel(name)

    def attention(self, names, key_heads=N):
        """Return the four projections; `names` are query, key, value and out."""
        heads = (N, key_heads, key_heads)
        query, key, value = (to_heads(self.layer(n), h) for n, h in zip(names, heads, strict=False))
        return {"query": query, "key": key, "value": value, "out": self.out(names[3])}

    def out(self, name):
        return from_heads(self.layer(name), N)


def gpt2(state, offset=0.0):
    return gpt2_parameters(state, N)


def bert(state, offset=0.0):
    return bert_parameters(state, N)


BEFORE = {"attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
BOTH = {
    "attention_norm": "input_layernorm",
    "attention_branch_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_branch_norm": "post_feedforward_layernorm",
}


def attention_of_llama(state, at):
    names = [f"{at}.self_attn.{x}_proj" for x in "qkvo"]
    return state.attention(names, K)


def attention_of_qwen3(state, at):
    norms = {
        f"{x}_ln": {"scale": state[f"{at}.self_attn.{y}_norm.weight"]}
        for x, y in (("query", "q"), ("key", "k"))
    }
    return attention_of_llama(state, at) | norms


def attention_of_gpt_oss(state, at):
    sinks = {"normalizer": {"sink": state[f"{at}.self_attn.sinks"]}}
    return attention_of_llama(state, at) | sinks


def attention_of_diffllama(state, at):
    rates = [state[f"{at}.self_attn.lambda_{x}"] for x in ("q1", "k1", "q2", "k2")]
    return {"inner": attention_of_llama(state, at), "rates": np.stack(rates)}


def attention_of_deepseek(state, at):
    at = f"{at}.self_attn"
    kernels = to_heads(state.kernel(f"{at}.kv_b_proj"), N)["kernel"]
    down = {"down": state.kernel(f"{at}.kv_a_proj_with_mqa")}
    query = state.kernel(f"{at}.q_a_proj")
    return down | {
        "query_down": query,
        "query_norm": {"scale": state[f"{at}.q_a_layernorm.weight"]},
        "query_up": to_heads(state.kernel(f"{at}.q_b_proj"), N),
        "norm": {"scale": state[f"{at}.kv_a_layernorm.weight"]},
        "key_up": {"kernel": kernels[..., :3]},
        "value_up": {"kernel": kernels[..., 3:]},
        "out": state.out(f"{at}.o_proj"),
    }


def gated(state, at):
    names = (("gate", "gate"), ("hidden", "up"), ("out", "down"))
    return {own: state.kernel(f"{at}.mlp.{name}_proj") for own, name in names}


def experts(state, at):
    names = {"hidden": "gate_up_proj", "out": "down_proj"}
    names |= {f"{own}_bias": f"{name}_bias" for own, name in names.items()}
    arrays = {own: state[f"{at}.mlp.experts.{name}"] for own, name in names.items()}
    return {"router": state.linear(f"{at}.mlp.router"), **arrays}


def llama(state, offset=0.0, norms=BEFORE, attention=attention_of_llama, feed_forward=gated):
    """Return the parameters of a decoder shaped like Llama; `norms` are its norms by our names."""
    whole, state = state, State("llama", state, "model.")
    stack = {"norm": {"scale": offset + state["norm.weight"]}}
    for n in range(LAYERS):
        at = f"layers.{n}"
        stack[f"block_{n}"] = {
            "attention": attention(state, at),
            "feed_forward": feed_forward(state, at),
            **{x: {"scale": offset + state[f"{at}.{y}.weight"]} for x, y in norms.items()},
        }
    tree = {"embedding": {"token": {"embedding": state["embed_tokens.weight"]}}, "stack": stack}
    if norms is BEFORE:  # Gemma's output is tied
        tree["output"] = {"kernel": np.asarray(whole["lm_head.weight"]).T}
    return tree


def gemma2(state, offset=1.0):
    return llama(state, offset, BOTH)


def t5(state, offset=0.0):
    state = State("t5", state, "")
    token = {"token": {"embedding": state["shared.weight"]}}
    tree = {"source": token}
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
            for number, (own, name) in enumerate(sublayers.items()):
                at = f"{side}.block.{n}.layer.{number}"
                block[own] = state.attention([f"{at}.{name}.{x}" for x in "qkvo"])
                block[f"{own}_norm"] = {"scale": state[f"{at}.layer_norm.weight"]}
            at = f"{side}.block.{n}.layer.{len(sublayers)}"
            names = (("hidden", "wi"), ("out", "wo"))
            block["feed_forward"] = {x: state.kernel(f"{at}.DenseReluDense.{y}") for x, y in names}
            block["feed_forward_norm"] = {"scale": state[f"{at}.layer_norm.weight"]}
    return tree


def longformer(state, offset=0.0):
    tree, state = bert_parameters(state, N), State("longformer", state, "")
    for n in range(LAYERS):
        at = f"encoder.layer.{n}.attention.self"
        tree["stack"][f"block_{n}"]["attention"] |= {
            f"{x}_global": to_heads(state.linear(f"{at}.{x}_global"), N)
            for x in ("query", "key", "value")
        }
    return tree


def deberta(state, offset=0.0):
    """Return the parameters of DeBERTa as of a BERT without positions and token types."""
    names = {name.replace("_proj.", "."): value for name, value in state.items()}
    missing = ("embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight")
    tree = bert_parameters({**names, **dict.fromkeys(missing, np.zeros(0))}, N)
    embedding = {name: tree["embedding"][name] for name in ("token", "norm")}
    for n in range(LAYERS):
        block = tree["stack"][f"block_{n}"]
        block["attention"] = {"inner": block["attention"]}
    state = State("deberta", state, "")
    shared = {
        "table": {"embedding": state["encoder.rel_embeddings.weight"]},
        "norm": state.norm("encoder.LayerNorm"),
    }
    tree["stack"]["block_0"]["attention"] |= shared
    return {"embedding": embedding, "stack": tree["stack"]}


def xlnet(state, offset=0.0):
    state, stack = State("xlnet", state, ""), {}
    for n in range(LAYERS):
        at = f"layer.{n}.rel_attn"
        halves = np.split(state[f"{at}.r"], 2)  # of sines and of cosines, ours in pairs
        inner = {x: {"kernel": state[f"{at}.{x[0]}"]} for x in ("query", "key", "value", "out")}
        inner["out"] = {"kernel": np.moveaxis(inner["out"]["kernel"], 0, -1)}
        stack[f"block_{n}"] = {
            "attention": {
                "inner": inner,
                "of_distance": {"kernel": np.stack(halves, 1).reshape(-1, N, 4)},
                "content": state[f"{at}.r_w_bias"],
                "place": state[f"{at}.r_r_bias"],
            },
            "attention_norm": state.norm(f"{at}.layer_norm"),
            "feed_forward": {
                "hidden": state.linear(f"layer.{n}.ff.layer_1"),
                "out": state.linear(f"layer.{n}.ff.layer_2"),
            },
            "feed_forward_norm": state.norm(f"layer.{n}.ff.layer_norm"),
        }
    return {"embedding": {"token": {"embedding": state["word_embedding.weight"]}}, "stack": stack}


def blocks_of_images(state, at, attention):
    names = {"attention_norm": "layernorm_before", "feed_forward_norm": "layernorm_after"}
    stack = {}
    for n in range(LAYERS):
        layer = f"{at}.{n}"
        is_new = f"{layer}.mlp.fc1.weight" in state.values
        feed_forward = ("mlp.fc1", "mlp.fc2") if is_new else ("intermediate.dense", "output.dense")
        stack[f"block_{n}"] = {
            "attention": attention(state, f"{layer}.attention"),
            "feed_forward": {
                own: state.linear(f"{layer}.{name}")
                for own, name in zip(("hidden", "out"), feed_forward, strict=True)
            },
            **{own: state.norm(f"{layer}.{name}") for own, name in names.items()},
        }
    return stack


def attention_of_vit(state, at):
    return state.attention([f"{at}.{x}_proj" for x in "qkvo"])


def attention_of_swin(state, at):
    """Return projections and the table, whose offsets are ours the other way round."""
    table = state[f"{at}.relative_position_bias.relative_position_bias_table"]
    table = table.reshape(3, 3, N)[::-1, ::-1]
    return attention_of_vit(state, at) | {"bias": {"table": np.moveaxis(table, -1, 0)}}


def attention_of_swin2(state, at):
    names = [f"{at}.self.{x}" for x in ("query", "key", "value")] + [f"{at}.output.dense"]
    scale = {"score": {"log_scale": state[f"{at}.self.logit_scale"][:, 0, 0]}}
    network = f"{at}.self.continuous_position_bias_mlp"
    return {
        "inner": state.attention(names) | scale,
        "hidden": state.linear(f"{network}.0"),
        "out": state.kernel(f"{network}.2"),
    }


def vit(state, offset=0.0):
    state = State("vit", state, "")
    at = "vit.embeddings"
    kernel = state[f"{at}.patch_embeddings.projection.weight"]
    bias = state[f"{at}.patch_embeddings.projection.bias"]
    stack = blocks_of_images(state, "vit.layers", attention_of_vit)
    return {
        "patch": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(bias)), "bias": bias},
        "class_token": state[f"{at}.cls_token"][0, 0],
        "positions": state[f"{at}.position_embeddings"][0],
        "stack": {**stack, "norm": state.norm("vit.layernorm")},
        "classifier": state.linear("classifier"),
    }


def swin(state, offset=0.0, attention=attention_of_swin):
    state = State("swin", state, "")
    patch = "embeddings.patch_embeddings.projection"
    blocks = blocks_of_images(state, "encoder.layers.0.blocks", attention)
    return {
        "patch": {
            "kernel": state[f"{patch}.weight"].transpose(2, 3, 1, 0),
            "bias": state[f"{patch}.bias"],
        },
        "norm": state.norm("embeddings.norm"),
        "stack": {**blocks, "norm": state.norm("layernorm")},
    }


def swin2(state, offset=0.0):
    return swin(state, attention=attention_of_swin2)

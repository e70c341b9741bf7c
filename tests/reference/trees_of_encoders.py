"""Our parameters out of other people's state dicts, for more recipes of encoders and images."""

import numpy as np

from attention_jax.interop import bert_parameters, to_heads
from tests.reference import trees
from tests.reference.sizes import LAYERS, D, N
from tests.reference.trees import State


def embedding_of_bert(state):
    names = {"token": "word", "token_type": "token_type", "position": "position"}
    names = {own: f"embeddings.{name}_embeddings.weight" for own, name in names.items()}
    tree = {own: {"embedding": state[name]} for own, name in names.items() if name in state.values}
    if "position" in tree:
        tree["position"] = {"table": tree["position"]["embedding"]}
    return tree | {"norm": state.norm("embeddings.LayerNorm")}


def roformer(state, offset=0.0):
    missing = {"embeddings.position_embeddings.weight": np.zeros(0)}
    tree = bert_parameters({**missing, **state}, N)
    del tree["embedding"]["position"]
    return tree


def albert(state, offset=0.0):
    state = State("albert", state, "")
    at = "encoder.albert_layer_groups.0.albert_layers.0"
    projection = {"projection": state.linear("encoder.embedding_hidden_mapping_in")}
    names = [f"{at}.attention.{name}" for name in ("query", "key", "value", "dense")]
    block = {
        "attention": state.attention(names),
        "attention_norm": state.norm(f"{at}.attention.LayerNorm"),
        "feed_forward": {
            "hidden": state.linear(f"{at}.ffn"),
            "out": state.linear(f"{at}.ffn_output"),
        },
        "feed_forward_norm": state.norm(f"{at}.full_layer_layer_norm"),
    }
    return {"embedding": embedding_of_bert(state) | projection, "stack": {"block_0": block}}


def modernbert(state, offset=0.0):
    state = State("modernbert", state, "")
    scale = {name: {"scale": state[f"{name}.weight"]} for name in ("embeddings.norm", "final_norm")}
    stack = {"norm": scale["final_norm"]}
    for n in range(LAYERS):
        at = f"layers.{n}"
        query, key, value = np.split(state[f"{at}.attn.Wqkv.weight"].T, 3, axis=1)
        parts = {"query": query, "key": key, "value": value}
        gate, hidden = np.split(state[f"{at}.mlp.Wi.weight"].T, 2, axis=1)
        block = stack[f"block_{n}"] = {
            "attention": {
                **{name: to_heads({"kernel": part}, N) for name, part in parts.items()},
                "out": state.out(f"{at}.attn.Wo"),
            },
            "feed_forward": {
                "gate": {"kernel": gate},
                "hidden": {"kernel": hidden},
                "out": state.kernel(f"{at}.mlp.Wo"),
            },
            "feed_forward_norm": {"scale": state[f"{at}.mlp_norm.weight"]},
        }
        if n > 0:
            block["attention_norm"] = {"scale": state[f"{at}.attn_norm.weight"]}
    tokens = {"embedding": state["embeddings.tok_embeddings.weight"]}
    return {"embedding": {"token": tokens, "norm": scale["embeddings.norm"]}, "stack": stack}


def fnet(state, offset=0.0):
    state, stack = State("fnet", state, ""), {}
    for n in range(LAYERS):
        at = f"encoder.layer.{n}"
        stack[f"block_{n}"] = {
            "attention_norm": state.norm(f"{at}.fourier.output.LayerNorm"),
            "feed_forward": {
                "hidden": state.linear(f"{at}.intermediate.dense"),
                "out": state.linear(f"{at}.output.dense"),
            },
            "feed_forward_norm": state.norm(f"{at}.output.LayerNorm"),
        }
    projection = {"projection": state.linear("embeddings.projection")}
    return {"embedding": embedding_of_bert(state) | projection, "stack": stack}


def dinov2(state, offset=0.0):
    """Return the parameters; those of the classifier, which the other has not, are zeros."""
    state, at = State("dinov2", state, ""), "embeddings"
    kernel = state[f"{at}.patch_embeddings.projection.weight"]
    bias = state[f"{at}.patch_embeddings.projection.bias"]
    stack = {"norm": state.norm("layernorm")}
    for n in range(LAYERS):
        layer = f"encoder.layer.{n}"
        stack[f"block_{n}"] = {
            "attention": trees.attention_of_vit(state, f"{layer}.attention"),
            "attention_norm": state.norm(f"{layer}.norm1"),
            "attention_branch_norm": {"scale": state[f"{layer}.layer_scale1.lambda1"]},
            "feed_forward": {
                "hidden": state.linear(f"{layer}.mlp.fc1"),
                "out": state.linear(f"{layer}.mlp.fc2"),
            },
            "feed_forward_norm": state.norm(f"{layer}.norm2"),
            "feed_forward_branch_norm": {"scale": state[f"{layer}.layer_scale2.lambda1"]},
        }
    return {
        "patch": {"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, len(bias)), "bias": bias},
        "class_token": state[f"{at}.cls_token"][0, 0],
        "positions": state[f"{at}.position_embeddings"][0],
        "stack": stack,
        "classifier": {"kernel": np.zeros((D, 5)), "bias": np.zeros(5)},
    }


def perceiver(state, offset=0.0):
    state = State("perceiver", state, "")

    def attention(at, heads):
        layers = {x: state.linear(f"{at}.attention.self.{x}") for x in ("query", "key", "value")}
        out = state.linear(f"{at}.attention.output.dense")
        kernel = out["kernel"].reshape(heads, -1, D)
        heads = {name: to_heads(layer, heads) for name, layer in layers.items()}
        return {**heads, "out": {"kernel": kernel, "bias": out["bias"]}}

    def feed_forward(at):
        return {
            "hidden": state.linear(f"{at}.mlp.dense1"),
            "out": state.linear(f"{at}.mlp.dense2"),
        }

    blocks = {
        n: {
            "attention": attention(at := f"encoder.self_attends.{n}", 4),
            "attention_norm": state.norm(f"{at}.attention.self.layernorm1"),
            "feed_forward": feed_forward(at),
            "feed_forward_norm": state.norm(f"{at}.layernorm"),
        }
        for n in range(2)
    }
    at = "encoder.cross_attention"
    names = ("attention.self.layernorm1", "attention.self.layernorm2", "layernorm")
    return {
        "latents": state["embeddings.latents"],
        "norms": {n: state.norm(f"{at}.{name}") for n, name in enumerate(names)},
        "attention": attention(at, 2),
        "feed_forward": feed_forward(at),
        "blocks": blocks,
    }


def qformer(state, offset=0.0):
    state, stack = State("qformer", state, ""), {}
    for n in range(LAYERS):
        at = f"encoder.layer.{n}"
        block = stack[f"block_{n}"] = {
            "feed_forward": {
                "hidden": state.linear(f"{at}.intermediate_query.dense"),
                "out": state.linear(f"{at}.output_query.dense"),
            },
            "feed_forward_norm": state.norm(f"{at}.output_query.LayerNorm"),
        }
        attentions = {"attention": "attention", "cross_attention": "crossattention"}
        for own, name in list(attentions.items())[: 2 - n % 2]:
            names = [f"{at}.{name}.attention.{x}" for x in ("query", "key", "value")]
            block[own] = state.attention([*names, f"{at}.{name}.output.dense"])
            block[f"{own}_norm"] = state.norm(f"{at}.{name}.output.LayerNorm")
    return {"norm": state.norm("layernorm"), "stack": stack}

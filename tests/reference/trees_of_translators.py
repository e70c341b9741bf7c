"""Our parameters out of other people's state dicts, for the recipes of `translators`."""

from tests.reference.sizes import LAYERS
from tests.reference.trees import State


def stacks(state):
    """Return the encoder and the decoder, with a last norm where the other has one."""
    found = {}
    for side, sublayers in (
        ("encoder", {"attention": "self_attn"}),
        ("decoder", {"attention": "self_attn", "cross_attention": "encoder_attn"}),
    ):
        stack = found[side] = {}
        if f"{state.prefix}{side}.layer_norm.weight" in state.values:
            stack["norm"] = state.norm(f"{side}.layer_norm")
        for n in range(LAYERS):
            at = f"{side}.layers.{n}"
            block = stack[f"block_{n}"] = {
                "feed_forward": {
                    "hidden": state.linear(f"{at}.fc1"),
                    "out": state.linear(f"{at}.fc2"),
                },
                "feed_forward_norm": state.norm(f"{at}.final_layer_norm"),
            }
            for own, name in sublayers.items():
                names = [f"{at}.{name}.{x}_proj" for x in ("q", "k", "v", "out")]
                block[own] = state.attention(names)
                block[f"{own}_norm"] = state.norm(f"{at}.{name}_layer_norm")
    return found


def token(state, name):
    return {"embedding": state[f"{name}.weight"]}


def bart(state, offset=0.0):
    """Return the parameters; the first two rows of the other's positions are for nothing."""
    state = State("bart", state, "model.")
    source, target = (
        {
            "position": {"table": state[f"{side}.embed_positions.weight"][2:]},
            "norm": state.norm(f"{side}.layernorm_embedding"),
        }
        for side in ("encoder", "decoder")
    )
    return {
        **stacks(state),
        "source": {"token": token(state, "shared"), **source},
        "target": target,
    }


def m2m(state, offset=0.0):
    state = State("m2m", state, "model.")
    return {**stacks(state), "source": {"token": token(state, "shared")}}


def whisper(state, offset=0.0):
    state = State("whisper", state, "model.")
    source = {}
    for own, name in (("first", "conv1"), ("second", "conv2")):
        kernel = state[f"encoder.{name}.weight"].transpose(2, 1, 0)
        source[own] = {"kernel": kernel, "bias": state[f"encoder.{name}.bias"]}
    target = {
        "token": token(state, "decoder.embed_tokens"),
        "position": {"table": state["decoder.embed_positions.weight"]},
    }
    return {**stacks(state), "source": source, "target": target}

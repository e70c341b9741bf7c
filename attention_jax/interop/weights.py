"""Parameters of published checkpoints as those of the models here, in either Flax API.

A state dict maps names to arrays, as a file of `safetensors` does (`safetensors.numpy.load_file`),
or to tensors of PyTorch, from `model.state_dict()`. The result is a tree of NumPy arrays: with NNX
`nnx.update(model, nnx.State(tree))`, with Linen `{"params": tree}`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attention_jax.base import checks

Tree = dict[str, Any]


class StateDict:
    """A state dict, read by name below a prefix that may be missing.

    >>> StateDict("f", {"model.weight": np.ones(2)}, "model.")["weight"]
    array([1., 1.])
    """

    def __init__(self, operation: str, values: Mapping[str, Any], prefix: str):
        self.operation = operation
        self.prefix = prefix if any(name.startswith(prefix) for name in values) else ""
        self.values = values

    def __getitem__(self, name: str) -> np.ndarray:
        """Return an array.

        Raises:
          KeyError: there is none of that name.
        """
        if self.prefix + name not in self.values:
            raise KeyError(
                f"{self.operation}: the state dict has no {self.prefix + name!r}; it has "
                f"{len(self.values)} arrays, the first of them {sorted(self.values)[:3]}."
            )
        value = self.values[self.prefix + name]
        if hasattr(value, "detach"):  # a tensor of PyTorch
            value = value.detach().cpu()
            value = value.float() if "bfloat16" in str(value.dtype) else value
        return np.asarray(value)

    def norm(self, name: str) -> Tree:
        """Return scale and bias of a LayerNorm."""
        return {"scale": self[f"{name}.weight"], "bias": self[f"{name}.bias"]}

    def linear(self, name: str, *, transposed: bool = True) -> Tree:
        """Return kernel [in, out] and bias; transposed from PyTorch's Linear [out, in]."""
        kernel = self[f"{name}.weight"]
        return {"kernel": kernel.T if transposed else kernel, "bias": self[f"{name}.bias"]}

    def count(self, name: Callable[[int], str]) -> int:
        """Return how many layers there are: the first number whose name is missing."""
        number = 0
        while self.prefix + name(number) in self.values:
            number += 1
        return number


def bert_parameters(state_dict: Mapping[str, Any], num_heads: int) -> Tree:
    """Return the parameters of a `TokenEncoder` from those of a model shaped like BERT.

    The model needs `max_length`, token types and a norm of the embedding, and BERT's epsilon:

        norm = functools.partial(nnx.LayerNorm, epsilon=1e-12, use_fast_variance=False)
        TokenEncoder(
            vocabulary_size, features, num_heads=N, num_layers=L, max_length=512, norm=norm,
            embedding_options={"num_types": 2, "norm": norm}, rngs=nnx.Rngs(0),
        )

    Args:
      state_dict: arrays or tensors by the names of Hugging Face's `BertModel`, or those of a model
        with a head, below "bert.". Its pooler and heads are left out.
      num_heads: N, which the arrays do not tell.

    Returns:
      A tree of arrays.

    Raises:
      KeyError: an array is missing.
      ValueError: features that are no multiple of the heads.

    Devlin et al. 2019.
    """
    state = StateDict("bert_parameters", state_dict, "bert.")
    stack = {}
    for n in range(state.count(lambda n: f"encoder.layer.{n}.attention.self.query.weight")):
        layer = f"encoder.layer.{n}"
        projections = {
            name: to_heads(state.linear(f"{layer}.attention.self.{name}"), num_heads)
            for name in ("query", "key", "value")
        }
        out = state.linear(f"{layer}.attention.output.dense")
        stack[f"block_{n}"] = {
            "attention": {**projections, "out": from_heads(out, num_heads)},
            "attention_norm": state.norm(f"{layer}.attention.output.LayerNorm"),
            "feed_forward": {
                "hidden": state.linear(f"{layer}.intermediate.dense"),
                "out": state.linear(f"{layer}.output.dense"),
            },
            "feed_forward_norm": state.norm(f"{layer}.output.LayerNorm"),
        }
    embedding = {
        "token": {"embedding": state["embeddings.word_embeddings.weight"]},
        "token_type": {"embedding": state["embeddings.token_type_embeddings.weight"]},
        "position": {"table": state["embeddings.position_embeddings.weight"]},
        "norm": state.norm("embeddings.LayerNorm"),
    }
    return {"embedding": embedding, "stack": stack}


def gpt2_parameters(state_dict: Mapping[str, Any], num_heads: int) -> Tree:
    """Return the parameters of a `CausalDecoder` from those of a model shaped like GPT-2.

    The model needs `max_length` and GPT-2's epsilon:

        norm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)
        CausalDecoder(
            vocabulary_size, features, num_heads=N, num_layers=L, max_length=1024, norm=norm,
            rngs=nnx.Rngs(0),
        )

    Args:
      state_dict: arrays or tensors by the names of Hugging Face's `GPT2Model`, or those of a model
        with a head, below "transformer."; logits come from the embedding.
      num_heads: N, which the arrays do not tell.

    Returns:
      A tree of arrays.

    Raises:
      KeyError: an array is missing.
      ValueError: features that are no multiple of the heads.

    Radford et al. 2019.
    """
    state = StateDict("gpt2_parameters", state_dict, "transformer.")
    stack: Tree = {"norm": state.norm("ln_f")}
    for n in range(state.count(lambda n: f"h.{n}.attn.c_attn.weight")):
        together = state.linear(f"h.{n}.attn.c_attn", transposed=False)
        kernels, biases = (np.split(together[name], 3, axis=-1) for name in ("kernel", "bias"))
        projections = {
            name: to_heads({"kernel": kernel, "bias": bias}, num_heads)
            for name, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        out = state.linear(f"h.{n}.attn.c_proj", transposed=False)
        stack[f"block_{n}"] = {
            "attention": {**projections, "out": from_heads(out, num_heads)},
            "attention_norm": state.norm(f"h.{n}.ln_1"),
            "feed_forward": {
                "hidden": state.linear(f"h.{n}.mlp.c_fc", transposed=False),
                "out": state.linear(f"h.{n}.mlp.c_proj", transposed=False),
            },
            "feed_forward_norm": state.norm(f"h.{n}.ln_2"),
        }
    embedding = {
        "token": {"embedding": state["wte.weight"]},
        "position": {"table": state["wpe.weight"]},
    }
    return {"embedding": embedding, "stack": stack}


def to_heads(linear: Mapping[str, np.ndarray], num_heads: int) -> Tree:
    """Cut what a projection returns into heads: kernel [D, N H] -> [D, N, H], bias likewise.

    >>> to_heads({"kernel": np.ones((4, 6))}, 2)["kernel"].shape
    (4, 2, 3)
    """
    return {
        name: array.reshape(*array.shape[:-1], num_heads, _depth(array.shape[-1], num_heads))
        for name, array in linear.items()
    }


def from_heads(linear: Mapping[str, np.ndarray], num_heads: int) -> Tree:
    """Cut what a projection takes into heads: kernel [N H, D] -> [N, H, D]; the bias stays [D].

    >>> from_heads({"kernel": np.ones((6, 4)), "bias": np.ones(4)}, 2)["kernel"].shape
    (2, 3, 4)
    """
    kernel = linear["kernel"]
    shape = (num_heads, _depth(kernel.shape[0], num_heads), kernel.shape[1])
    return {**linear, "kernel": kernel.reshape(shape)}


def _depth(features: int, num_heads: int) -> int:
    return checks.multiple("weights", "features", features, "num_heads", num_heads)

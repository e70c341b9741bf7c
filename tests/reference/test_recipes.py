"""Recipes build as they stand, and the README tells how long each is."""

import ast
import inspect
import pathlib
import re

import jax
import pytest
from flax import nnx

from tests.reference import decoders, encoders, images, layers, translators, variants

README = pathlib.Path(__file__).parents[2] / "attention_jax" / "README.md"
VARIANT = [variants.decoder, variants.heads]
RECIPES = {
    "GPT-2": [decoders.gpt2],
    "Llama": [decoders.llama],
    "Mistral": [decoders.llama],
    "Qwen3": [decoders.llama, decoders.qwen3],
    "Gemma 2": [decoders.gemma2],
    "GPT-OSS": [decoders.gpt_oss, decoders.Experts],
    "DeepSeek V3": [decoders.deepseek, decoders.LatentAttention],
    "DiffLlama": [decoders.diffllama, decoders.Differential],
    "T5": [decoders.t5],
    "BERT, MiniLM": [encoders.bert],
    "Longformer": [encoders.bert, encoders.longformer, encoders.mask_of_longformer],
    "BigBird": [encoders.bert, encoders.mask_of_bigbird],
    "DeBERTa v2": [
        encoders.bert,
        encoders.deberta,
        encoders.Disentangled,
        encoders.disentangled,
        encoders.log_bucket,
    ],
    "XLNet": [
        encoders.bert,
        encoders.xlnet,
        encoders.RelativeAttention,
        encoders.with_distances,
    ],
    "ViT": [images.vit],
    "Swin": [images.swin, images.Swin],
    "Swin v2": [images.swin2, images.Swin, images.ContinuousBias, images.capped_cosine],
    "DINOv2": [images.dinov2, images.LayerScale],
    "Perceiver": [images.perceiver, images.Perceiver],
    "BLIP-2's Q-Former": [images.qformer, images.QueryingTransformer],
    "RoFormer": [encoders.bert, encoders.roformer],
    "ALBERT": [encoders.bert, encoders.albert],
    "ModernBERT": [encoders.bert, encoders.modernbert, encoders.mask_of_modernbert],
    "FNet": [encoders.bert, encoders.fnet, encoders.Fourier],
    "Gemma 3": [*VARIANT, variants.gemma3],
    "Phi-3": [*VARIANT, variants.phi3],
    "OLMo 2": [*VARIANT, variants.olmo2],
    "StableLM": [*VARIANT, variants.stablelm],
    "Granite": [*VARIANT, variants.granite],
    "Llama 3.1": [*VARIANT, variants.llama3],
    "Llama 4": [*VARIANT, variants.llama4, variants.turned_and_normed, variants.tempered],
    "SmolLM3": [*VARIANT, variants.smollm3],
    "Cohere": [*VARIANT, variants.cohere],
    "Falcon": [*VARIANT, variants.falcon],
    "GPT-NeoX": [*VARIANT, variants.neox],
    "BLOOM": [variants.decoder, variants.bloom, variants.gelu_of_bloom],
    "BART": [translators.translator, translators.bart],
    "M2M-100": [translators.translator, translators.m2m, translators.after_padding],
    "Whisper": [translators.translator, translators.whisper, translators.Spectrogram],
    "joeynmt": [layers.bahdanau, layers.luong, layers.multi_head],
    "Keras": [layers.multi_head, layers.grouped, layers.additive_of_vectors],
    "PyG": [layers.gat, layers.gat2],
}


@pytest.fixture(autouse=True)
def float64(x64):
    """Run in float64, without PyTorch."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def count_lines(part):
    """Return how many lines of code there are, without blank ones and docstrings."""
    source = inspect.getsource(part)
    tree = ast.parse(source)
    lines = {n for n, line in enumerate(source.splitlines(), start=1) if line.strip()}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def rows_of_table():
    text = README.read_text(encoding="utf-8")
    table = text.split("| model | mechanism | lines | largest difference |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[1:]]
    return {re.sub(r"\[(.*)\]\(.*\)", r"\1", row[0]): row for row in rows}


def test_the_readme_counts_the_lines():
    rows = rows_of_table()
    found = {name: int(row[2]) for name, row in rows.items()}
    assert found == {name: sum(map(count_lines, parts)) for name, parts in RECIPES.items()}
    for name, (model, *_) in rows.items():
        folder = pathlib.Path(inspect.getfile(RECIPES[name][0]))
        assert f"tests/reference/{folder.name})" in model


def needs_nothing(part):
    parameters = inspect.signature(part).parameters.values()
    optional = (p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in parameters)
    return inspect.isfunction(part) and all(optional)


@pytest.mark.slow
def test_recipes_build():
    """Without the packages of others, so that no recipe goes stale unseen."""
    builds = {part for parts in RECIPES.values() for part in parts if needs_nothing(part)}
    builds.remove(variants.heads)  # a layer, not a model
    assert len(builds) == 43
    for build in builds:
        assert jax.tree.leaves(nnx.state(nnx.eval_shape(build), nnx.Param))

"""The callable types: what fits them, and what they refuse at run time and by pyright."""

import json
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax import attend, bind, masks, normalizers, positions, scores
from attention_jax.base import typing
from attention_jax.linear import feature_maps, linear_attention
from attention_jax.scores import prepared
from attention_jax.scores.composition import require_score
from tests.contract import examples

KINDS = [
    "Score",
    "PositionalScore",
    "MaskFunction",
    "Bias",
    "Normalizer",
    "QueriedNormalizer",
    "HeadMap",
    "FeatureMap",
]
X = jnp.ones((1, 3, 1, 4))


@pytest.mark.parametrize("name", KINDS)
def test_every_callable_type_says_its_shapes(name):
    first_line = getattr(typing, name).__doc__.splitlines()[0]
    assert re.search(r"`\w+\(.+\) -> .+`", first_line)


def test_every_axis_letter_is_explained_once():
    letters = re.findall(r"^\| ([A-Z]) \|", typing.__doc__, flags=re.MULTILINE)
    assert sorted(letters) == sorted(set(letters))
    assert set("BTSNKHVD") <= set(letters)


def drawn(*shape):
    return np.ones(shape)


FITTING = {
    "Score": [examples.score_example(name, drawn).score for name in examples.SCORES],
    "PositionalScore": [
        bind(scores.location, weight=np.ones((4, 9))),
        bind(positions.relative_key, table=np.ones((3, 4))),
    ],
    "MaskFunction": [
        masks.as_mask(examples.mask_example(name, 1, 2, 4, 4).mask) for name in examples.MASKS
    ],
    "Bias": [
        bind(positions.alibi, slope=0.5),
        bind(positions.t5_bias, table=np.ones(32)),
        bind(positions.grid_bias, table=np.ones((3, 3)), width=2),
        positions.alibi_bias(4).function,
    ],
    "Normalizer": [example.normalizer for example in examples.NORMALIZERS.values()],
    "QueriedNormalizer": [bind(normalizers.contextual_positions, table=np.ones((3, 4)))],
    "HeadMap": [examples.head_map_example(name, drawn).head_map for name in examples.HEAD_MAPS],
    "FeatureMap": [
        getattr(feature_maps, name) for name in ("elu_plus_one", "relu", "taylor", "identity")
    ]
    + [bind(feature_maps.hedgehog, weight=np.eye(4), bias=np.zeros(4))],
}


@pytest.mark.parametrize("name", KINDS)
def test_what_the_library_exports_fits(name):
    for function in FITTING[name]:
        typing.require_callable("f: argument", function, getattr(typing, name))


WRONG = {
    "one argument": len,
    "three arguments": lambda one, two, three: one,
    "no arguments": lambda: 0,
    "names only": lambda *, query, key, q_idx, kv_idx: query,
    "a number": 3,
    "a word": "dot",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_another_function_is_refused_by_the_formula_of_the_type(kind, wrong):
    if kind in ("HeadMap", "FeatureMap") and wrong == "one argument":
        return
    of = getattr(typing, kind)
    with pytest.raises(TypeError) as error:
        typing.require_callable("attend: score", WRONG[wrong], of)
    formula = of.__doc__.split("`")[1]
    assert str(error.value).startswith(f"attend: score must be a function `{formula}`, got ")
    assert str(error.value).endswith(".")


def test_the_message_shows_the_signature_and_what_is_wrong_with_it():
    with pytest.raises(TypeError) as error:
        require_score("prepare: score", len)
    assert str(error.value) == (
        "prepare: score must be a function `score(query [T, Hq], key [S, Hk]) -> logits [T, S]`, "
        "got len(obj, /): too many positional arguments."
    )


REFUSED = {
    "score": (lambda: attend(X, X, X, score=len), "attend: score must be a function `score(query"),
    "bias": (lambda: attend(X, X, X, bias=len), "attend: bias must be a function `bias(q_idx"),
    "normalizer": (
        lambda: attend(X, X, X, normalizer=len),
        "attend: normalizer must be a function `normalizer(logits",
    ),
    "mask": (lambda: attend(X, X, X, mask=len), "mask must be a function `mask(q_idx"),
    "part of a mask": (lambda: masks.Causal() & len, "mask must be a function `mask(q_idx"),
    "feature map": (
        lambda: linear_attention(X, X, X, feature_map=feature_maps.hedgehog),
        "linear_attention: feature_map must be a function `feature_map(x [T, H]) -> features",
    ),
    "score of a decoder": (
        lambda: prepared.prepare(len, X[0]),
        "prepare: score must be a function `score(query",
    ),
    "score without its parameters": (
        lambda: prepared.prepare(scores.bilinear, X[0]),
        "prepare: score still waits for weight; give them with bind(score, weight=...).",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_the_library_refuses_what_does_not_fit(call, message):
    with pytest.raises(TypeError) as error:
        call()
    assert str(error.value).startswith(message)


SNIPPET = """
import jax
from attention_jax import base, bind, linear, masks, normalizers, positions, scores
from attention_jax.scores import prepared

def three(query: jax.Array, key: jax.Array, weight: jax.Array) -> jax.Array: return weight
def text(query: jax.Array, key: jax.Array) -> str: return ""

fits: list[base.Score] = [scores.dot, scores.scaled(scores.dot, 2.0), bind(three, weight=1.0)]
placed: base.PositionalScore = bind(positions.relative_key, table=1.0)
bias: base.Bias = bind(positions.alibi, slope=1.0)
weigh: list[base.Normalizer] = [normalizers.softmax, bind(normalizers.top_k, k=2)]
may: list[masks.MaskLike] = [masks.Causal(), None, lambda q_idx, kv_idx: q_idx == kv_idx]
scores.scaled(placed, 2.0)

a: base.Score = len  # refused
b: base.Score = three  # refused
c: base.Score = text  # refused
d: base.Score = 3  # refused
e: base.Bias = scores.bilinear  # refused
f: base.Normalizer = normalizers.top_k  # refused
g: base.FeatureMap = scores.dot  # refused
h: masks.MaskLike = len  # refused
scores.scaled(len, 2.0)  # refused
scores.scaled(three, 2.0)  # refused
scores.scaled(scores.dot)  # refused
masks.Causal() & 3  # refused
masks.as_mask("causal")  # refused
normalizers.streaming(len)  # refused
prepared.prepare(len, jax.numpy.ones(3))  # refused
x = jax.numpy.ones(3)
linear.linear_attention(x, x, x, feature_map=scores.dot)  # refused
linear.linear_attention(x, x, x, mask=3)  # refused
"""


@pytest.mark.slow
def test_pyright_refuses_what_does_not_fit_and_nothing_else(tmp_path):
    pytest.importorskip("pyright")
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET)
    command = [sys.executable, "-m", "pyright", "--outputjson"]
    command += ["--pythonpath", sys.executable, str(path)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    refused = {found["range"]["start"]["line"] for found in found["generalDiagnostics"]}
    expected = {n for n, line in enumerate(SNIPPET.splitlines()) if "# refused" in line}
    assert refused == expected, found["generalDiagnostics"]

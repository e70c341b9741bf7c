"""The examples of the page on writing one's own parts do what it says."""

import doctest
import re
from pathlib import Path

import pytest

import attention_jax
from attention_jax import base, masks, normalizers, scores

PAGE = Path(attention_jax.__file__).with_name("EXTENDING.md")
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


@pytest.mark.slow
def test_the_examples_run():
    failed, attempted = doctest.testfile(str(PAGE), module_relative=False, optionflags=FLAGS)
    assert attempted > 40 and not failed


def test_every_type_and_mark_is_named():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", text))
    types = {"Score", "PositionalScore", "MaskFunction", "Bias", "Normalizer", "HeadMap"}
    types |= {"QueriedNormalizer", "FeatureMap"}
    tools = {"rule", "Parameter", "ShapeError", "checks", "learned", "bind", "per_head"}
    assert types | tools <= named
    assert types | {"rule", "Parameter", "ShapeError", "checks"} <= set(base.__all__)
    assert {"positional", "Separated", "separate"} <= set(scores.__all__)
    assert {"Exponential", "Elementwise"} <= set(normalizers.__all__)
    assert {"Mask", "Lookup"} <= set(masks.__all__)

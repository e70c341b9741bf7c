import re

import pytest

from attention_jax import normalizers, scores
from attention_jax.base import typing
from attention_jax.masks import Causal


@pytest.mark.parametrize("name", ["Score", "Predicate", "Bias", "Normalizer", "FeatureMap"])
def test_every_callable_type_says_its_shapes(name):
    first_line = getattr(typing, name).__doc__.splitlines()[0]
    assert re.search(r"`\w+\(.+\) -> .+`", first_line)


def test_the_library_s_functions_are_of_these_types():
    assert isinstance(scores.dot, typing.Score)
    assert isinstance(scores.scaled(scores.dot, 2.0), typing.Score)
    assert isinstance(Causal(), typing.Predicate)
    assert isinstance(normalizers.softmax, typing.Normalizer)
    assert not isinstance(3, typing.Score)


def test_every_axis_letter_is_explained_once():
    letters = re.findall(r"^\| ([A-Z]) \|", typing.__doc__, flags=re.MULTILINE)
    assert sorted(letters) == sorted(set(letters))
    assert set("BTSNKHVD") <= set(letters)

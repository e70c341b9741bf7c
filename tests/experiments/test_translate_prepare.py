"""A score that reaches no further than so many words is refused before anything is trained."""

import re

import pytest

from attention_jax.base.checks import ShapeError
from experiments.command_line import UsageError
from experiments.translate.checks import CONTROLS, SCORES
from experiments.translate.config import Config
from experiments.translate.model import Sizes
from experiments.translate.prepare import check_fits, matched, prepare
from experiments.translate.train_step import (
    count_parameters,
)

SMALL = {"data": "copy", "train_size": 90, "valid_size": 9, "test_size": 9, "batch_size": 16}


def check(score, **options):
    check_fits(score, prepare(Config(**SMALL, width=8, **options)))


def refused(score, **options):
    with pytest.raises(UsageError) as error:
        check(score, **options)
    return str(error.value)


def dot_of_few(query, key):
    """Refuse more than a few keys, whatever the sizes are."""
    if len(key) > 5:
        raise ShapeError(f"dot_of_few: S = {len(key)} keys are more than 5.")
    return query @ key.T


@pytest.mark.slow
@pytest.mark.parametrize("of_model", [{}, {"model": "transformer", "layers": 1}])
def test_the_size_that_is_named_is_the_least_that_fits(of_model):
    options = {"scores": ("location",), **of_model}
    told = refused("location", **options)
    size = int(re.search(r"give an --attention_size of at least (\d+)\.$", told)[1])
    assert told.startswith("--scores=location does not fit this run: location: weight [Q, L] has ")
    check("location", **options, attention_size=size)
    refused("location", **options, attention_size=size - 1)


def test_where_sizes_are_matched_the_flag_alone_would_not_help():
    told = refused("location", scores=("bilinear", "location"), match_parameters=True)
    assert re.search(r"at least \d+ and leave out --match_parameters\.$", told)


def test_where_no_size_helps_another_score_is_asked_for():
    name = f"{__name__}.dot_of_few"
    told = refused(name, scores=(name,), attention_size=4)
    assert told.startswith(f"--scores={name} does not fit this run: dot_of_few: S = ")
    assert told.endswith(" keys are more than 5; choose another score.")


def test_nothing_is_written_for_what_does_not_fit(tmp_path, translate, capsys):
    flags = [f"--{name}={value}" for name, value in SMALL.items()]
    names = "--scores=bilinear,location"
    assert translate(*flags, "--width=8", names, f"--workdir={tmp_path}/run") == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("translate: --scores=location does not fit this run: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES + CONTROLS)
def test_matched_translators_have_equally_many_parameters(score):
    sizes = Sizes(source_words=114, target_words=159, width=64, attention_size=64, readout_size=64)
    wanted = count_parameters("additive", sizes)
    found = count_parameters(score, matched(score, sizes, wanted))
    assert abs(found / wanted - 1) <= 0.01


@pytest.mark.slow
@pytest.mark.parametrize("score", ["additive", "dot", "uniform", "location"])
def test_matched_transformers_have_equally_many_parameters(score):
    sizes = Sizes(
        source_words=11,
        target_words=13,
        width=64,
        attention_size=16,
        readout_size=256,
        model="transformer",
        heads=4,
        layers=2,
        positions="rotary",
    )
    wanted = count_parameters("scaled_dot", sizes)
    found = count_parameters(score, matched(score, sizes, wanted))
    assert abs(found / wanted - 1) <= 0.01

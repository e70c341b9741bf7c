"""Flags are the fields of the configuration; a bad one gets one sentence, at once."""

import dataclasses
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from attention_jax import scores
from experiments.command_line import HelpRequested, UsageError
from experiments.translate.checks import CONTROLS, SCORES
from experiments.translate.command_line import help_text, parse
from experiments.translate.config import Config
from experiments.translate.report import command

ROOT = Path(__file__).parents[2]


def test_without_flags_everything_has_its_default():
    assert parse([]) == Config()
    assert Config().scores == ("additive", "scaled_dot")
    assert Config().seeds == 3


def test_every_field_can_be_given():
    given = parse(
        ["--data=x.tsv", "--scores=dot,none", "--train_size=7", "--dropout=.25", "--nolowercase"]
        + ["--match_parameters", "--attention_size", "5", "--learning_rate=1e-4", "--workdir=w"]
    )
    assert given == Config(
        data="x.tsv",
        scores=("dot", "none"),
        train_size=7,
        dropout=0.25,
        lowercase=False,
        match_parameters=True,
        attention_size=5,
        learning_rate=1e-4,
        workdir="w",
    )


def test_flags_are_read_from_a_file(tmp_path):
    (tmp_path / "run.flags").write_text("--seeds=5\n# a comment\n--scores=dot\n")
    assert parse([f"--flagfile={tmp_path}/run.flags", "--steps=20"]) == Config(
        seeds=5, scores=("dot",), steps=20
    )


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/configs").glob("*.flags")))
def test_recorded_runs_say_how_they_were_made(path):
    head = path.read_text(encoding="utf-8").split("\n--")[0]
    assert all(line.startswith("#") for line in head.split("\n"))
    assert f"--flagfile={path.relative_to(ROOT)}" in head
    assert "BLEU" in head and "min" in head
    assert parse([f"--flagfile={path}", "--data=DIR"]) != Config(data="DIR")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--seed=3", r"unknown flag --seed; did you mean --seeds\?"),
        ("--zzz=3", "unknown flag --zzz; --help lists all flags."),
        ("--seeds=two", "--seeds: 'two' is no whole number; --help lists all flags."),
        (f"--seeds={5000 * '9'}", "--seeds: the number has too many digits; --help lists all .*"),
        ("--seeds=0", "--seeds is 0, but a whole number of at least 1 is needed."),
        ("--steps=-5", "--steps is -5, but a whole number of at least 1 is needed."),
        ("--width=7", "--width is 7, but an even whole number of at least 2 is needed."),
        ("--width=0", "--width is 0, but an even whole number of at least 2 is needed."),
        ("--learning_rate=inf", "--learning_rate is inf, but a finite number above 0 is needed."),
        ("--clip=0", "--clip is 0.0, but a finite number above 0 is needed."),
        ("--dropout=1", r"--dropout is 1.0, but a number in \[0, 1\) is needed."),
        ("--label_smoothing=nan", r"--label_smoothing is nan, but a number in \[0, 1\) .*"),
        ("--weight_decay=-1", "--weight_decay is -1.0, but a finite number of at least 0 .*"),
        ("--train_size=0", "--train_size is 0, but a whole number of at least 1 is needed."),
        ("--words=bpe", "--words is bpe, but tokenizer or spaces is needed."),
        ("--links_from=2", "--links_from is 2, but 0 or 1 is needed."),
        ("--scores=", "--scores is empty; name at least one score."),
        ("--scores=dot,dot", "--scores names dot twice; name every score once."),
        ("--scores=,", "--scores has an empty name; put one comma between two names."),
        ("--scores=..a", "--scores: there is no score '..a'; choose from additive, .*function."),
        ("--scores=dott", "--scores: there is no score 'dott'; choose from additive, .*, none.*"),
        ("grammar", "'grammar' is no flag; write --name=value, and --help lists all flags."),
        (
            "--flagfile=/no/file",
            "--flagfile: /no/file: No such file or directory; give a fi.*",
        ),
        ("--flagfile=/", "--flagfile: /: Is a directory; give a file of flags."),
    ],
)
def test_a_value_that_means_nothing_is_refused(flag, sentence):
    with pytest.raises(UsageError) as error:
        parse([flag])
    assert re.fullmatch(sentence, str(error.value))


@pytest.mark.parametrize(
    "flag",
    ["source=2", "target=en", "min_count=5", "max_vocabulary=9", "lowercase=false"]
    + ["words=spaces", "links_from=1"],
)
def test_flags_of_files_are_refused_for_generated_data(flag, tmp_path):
    name = flag.split("=")[0]
    for data in ("grammar", "copy"):
        with pytest.raises(UsageError) as error:
            parse([f"--{flag}", f"--data={data}"])
        assert str(error.value) == (
            f"--{name} is for data in files, and {data} is generated; leave it out."
        )
    parse([f"--{flag}", "--data=x.tsv"])
    with pytest.raises(UsageError, match="holds no run that can translate"):
        parse([f"--{flag}", "--mode=evaluate", f"--workdir={tmp_path}"])


def test_help_names_every_flag_and_every_score():
    with pytest.raises(HelpRequested) as request:
        parse(["--help"])
    text = str(request.value)
    assert text == help_text()
    assert max(map(len, text.splitlines())) <= 98
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text
    for score in SCORES + CONTROLS:
        assert score in text


def test_every_score_of_the_library_can_be_asked_for():
    compositions = {"positional", "projected", "row_normalized", "scaled", "soft_capped"}
    no_scores = {"Separated", "separate", "TanhBySines"}
    assert set(SCORES) == set(scores.__all__) - compositions - no_scores


def test_help_takes_less_than_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.translate", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of the processor, because other programs may be running.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1.0
    assert "--learning_rate" in done.stdout
    assert done.stderr == ""


def test_equal_configurations_share_a_folder_and_others_do_not():
    assert Config().directory == Config(workdir="").directory
    assert Config(seeds=4).directory != Config().directory
    assert Config(data="some/corpus.tsv").directory.name.startswith("corpus-")
    assert Config(data="[x]b*?.tsv").directory.name.startswith("_x_b__-")
    assert Config(checkpoint_seconds=1.0).key == Config(workdir="w").key == Config().key


@pytest.mark.parametrize(
    ("steps", "evaluate_every", "round", "chunk"),
    [(800, 50, 25, 5), (50, 50, 25, 5), (7, 50, 1, 1), (12, 6, 6, 3), (1, 1, 1, 1)],
)
def test_chunks_divide_every_interval(steps, evaluate_every, round, chunk):
    config = Config(steps=steps, evaluate_every=evaluate_every)
    assert (config.round, config.chunk) == (round, chunk)


def test_the_command_in_the_report_gives_the_same_run():
    config = Config(scores=("dot", "none"), steps=10, match_parameters=True, data="a b.tsv")
    words = command(config.identity).split(" -m experiments.translate ")[1]
    import shlex

    assert parse(shlex.split(words)) == config


def test_a_reader_of_the_help_may_stop_early():
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.translate", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        program.stdout.close()
        assert program.stderr.read() == b""
        assert program.wait() == 0


def test_a_type_that_is_not_there():
    with pytest.raises(UsageError, match="--dtype is float16, but float32 or bfloat16"):
        parse(["--dtype=float16"])


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--query=next", "--query is next, but previous or current is needed."),
        ("--bridge=none", "--bridge is none, but dense or zero is needed."),
        ("--projections=", "--projections is , but untied or tied is needed."),
    ],
)
def test_a_switch_that_is_not_there(flag, sentence):
    with pytest.raises(UsageError) as error:
        parse([flag])
    assert str(error.value) == sentence

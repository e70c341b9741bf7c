"""A sweep chooses by validation alone, corrects for all tests, and says no more than they do."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command_line import UsageError, terminal
from experiments.significance import holm, sign_flip_p_value
from experiments.translate.config import Config
from experiments.translate.table import COLUMNS
from experiments.translate_sweep import results, table
from experiments.translate_sweep.command_line import parse
from experiments.translate_sweep.config import LISTED

ROOT = Path(__file__).parents[2]
HIGH = (90.0, 91.0, 92.0, 90.0, 91.0, 92.0, 93.0, 90.0)
LOW = (40.0, 42.0, 41.0, 44.0, 40.0, 41.0, 42.0, 45.0)


def record(score, point, rate, loss, bleu):
    """A run that went well."""
    seeds = len(bleu)
    return {
        "score": score,
        "point": point,
        "learning_rate": rate,
        "folder": f"{score} {point} {rate}",
        "parameters": 100,
        "metrics": {"valid_loss": [loss] * seeds, "bleu": list(bleu), "alignment_error": None},
    }


def diverged(score, point, rate):
    about = {"score": score, "point": point, "learning_rate": rate, "folder": f"{score} {rate}"}
    return {**about, "diverged": "the loss of step 3 is nan; no step is kept."}


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--seeds=2,3", "--seeds is 2,3, but takes one value; --help names the lists."),
        ("--learning_rate=0.1,", "flag --learning_rate=0.1,: an element of the list is empty; .*"),
        ("--learning_rate=0.1,x", "--learning_rate: 'x' is no number; --help lists all flags."),
        ("--attention_size=2,8,2", "--attention_size names 2 twice; name every value once."),
        ("--attention_size=2,0", "--attention_size is 0, but a whole number of at least 1 .*"),
        ("--dropout=0,1", r"--dropout is 1.0, but a number in \[0, 1\) is needed."),
        ("--scores=dot,dot", "--scores names dot twice; name every score once."),
        ("--attention_sizes=2", r"unknown flag --attention_sizes; did you mean --attention_size\?"),
        ("--shard=9/8", "--shard is 9/8, but I/N with I from 1 to N is needed, as in 2/8."),
        ("--input=x", "unknown flag --input; --help lists all flags."),
    ],
)
def test_a_value_that_means_nothing_is_refused(flag, sentence):
    with pytest.raises(UsageError) as error:
        parse([flag])
    assert re.fullmatch(sentence, str(error.value))


def test_help_answers_without_jax():
    code = (
        "import sys; from experiments.translate_sweep.__main__ import main; main(['--help']); "
        "print('jax' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert all(f"--{name}" in printed for name in LISTED)
    assert "--mode=" not in printed
    assert printed.rstrip().endswith("False")


def test_a_run_is_named_by_its_own_configuration_alone():
    flags = ("--scores=dot,none", "--workdir=w", "--seeds=2")
    few = {str(trial): trial.config for trial in parse([*flags, "--attention_size=2,4"]).trials()}
    more = parse([*flags, "--attention_size=4,2,8", "--learning_rate=0.01,0.02"])
    many = {str(trial): trial.config for trial in more.trials()}
    assert len(few) == 4 and len(many) == 12
    assert set(few.values()) < set(many.values())
    assert len({config.directory for config in many.values()}) == 12
    assert many["dot, attention_size=8, learning_rate=0.02"] == Config(
        scores=("dot",),
        seeds=2,
        attention_size=8,
        learning_rate=0.02,
        workdir=many["dot, attention_size=8, learning_rate=0.02"].workdir,
    )


def test_the_folder_of_a_sweep_has_a_name_in_which_checkpoints_can_be_saved():
    assert parse(["--data=[x]b.tsv"]).directory.name.startswith("sweep-_x_b-")


def test_the_folder_is_that_of_what_is_swept_and_of_all_that_is_not():
    def folder(*flags):
        return parse(flags).directory

    of_width = folder("--width=8,16")
    assert of_width == folder("--width=8,16,32", "--learning_rate=0.01,0.03", "--scores=dot")
    others = (
        ["--attention_size=2,8"],
        ["--attention_size=2,8", "--steps=2000"],
        ["--width=8,16", "--train_size=5"],
        ["--width=8"],
        ["--width=16"],
    )
    assert len({of_width, *(folder(*flags) for flags in others)}) == 1 + len(others)


def test_parameters_are_matched_to_those_of_the_first_score():
    trials = parse(["--scores=additive,dot", "--match_parameters"]).trials()
    assert [trial.config.scores for trial in trials] == [("additive",), ("additive", "dot")]


def test_the_rate_is_chosen_by_validation_and_not_by_the_test_set():
    worse, better = record("dot", {}, 0.1, 2.0, HIGH), record("dot", {}, 0.2, 1.0, LOW)
    lost = diverged("dot", {}, 0.3)
    assert results.choose([worse, better, lost]) is better
    assert results.choose([lost]) is None


def test_all_tests_of_a_sweep_are_corrected_together():
    sweep = parse(["--scores=additive,dot,none", "--attention_size=2,8", "--seeds=8"])
    bleu = {
        2: {"additive": HIGH, "dot": LOW, "none": [x + 1 for x in LOW]},
        8: {"additive": HIGH, "dot": HIGH[::-1], "none": LOW[::-1]},
    }
    records = [
        record(score, {"attention_size": size}, 0.01, 1.0, values)
        for size, of_size in bleu.items()
        for score, values in of_size.items()
    ]
    found = results.summarize(sweep, records)
    pairs = (("additive", "dot"), ("additive", "none"), ("dot", "none"))
    alone = [
        sign_flip_p_value([x - y for x, y in zip(of_size[a], of_size[b], strict=True)])
        for of_size in bleu.values()
        for a, b in pairs
    ]
    assert [c["p_value"] for c in found["comparisons"]] == pytest.approx(holm(alone))
    assert [(c["first"], c["second"]) for c in found["comparisons"]] == [*pairs, *pairs]
    assert "corrected for 6 comparisons" in found["comparisons"][0]["sentence"]
    assert found["conclusion"] == (
        "Scores are compared by BLEU on test, each at its best learning rate by validation loss, "
        "in paired permutation tests over 8 seeds, corrected for all 6 of the sweep. Shown (p <= "
        "0.05): additive is higher than dot at attention_size=2 (by 49.2); additive is higher than "
        "none at attention_size=2 (by 48.2) and 8 (by 49.2); none is higher than "
        "dot at attention_size=2 (by 1); dot is higher than none at attention_size=8 (by 49.2). No "
        "difference is shown between additive and dot at attention_size=8, which does not show "
        "that they are equal. One learning rate was tried, 0.01; each score may do better at "
        "another. Seeds stand for other initial weights and another order of the same sentences: "
        "nothing is said about other data, sizes or lengths of training."
    )


def test_few_seeds_conclude_nothing_and_a_rate_at_the_end_is_told():
    sweep = parse(["--learning_rate=0.1,0.2", "--scores=dot,none,uniform", "--attention_size=2"])
    found = results.summarize(
        sweep,
        [
            record("dot", {}, 0.1, 1.0, HIGH[:3]),
            record("dot", {}, 0.2, 2.0, HIGH[:3]),
            diverged("none", {}, 0.1),
            record("none", {}, 0.2, 2.0, LOW[:3]),
            diverged("uniform", {}, 0.1),
            diverged("uniform", {}, 0.2),
        ],
    )
    assert found["diverged"] == [{"score": "uniform", "point": {}}]
    assert [(m["score"], m["learning_rate"]) for m in found["mechanisms"]] == [
        ("dot", 0.1),
        ("none", 0.2),
    ]
    assert (
        "Nothing can be concluded about which score is better: with so few seeds the smallest "
        "possible p is 0.25; at least 6 seeds are needed for p <= 0.05. uniform: diverged at every "
        "learning rate, and not compared. 2 of 2 best learning rates are the smallest or the "
        "largest tried, and a wider --learning_rate may change these results."
    ) in found["conclusion"]


def test_the_table_says_what_few_seeds_are_too_few_for(capsys):
    sweep = parse(["--scores=dot,none", "--seeds=3"])
    records = [record("dot", {}, 0.1, 1.0, HIGH[:3]), record("none", {}, 0.1, 1.0, LOW[:3])]
    for of_one in records:
        ones = [1.0] * 3
        of_one["metrics"] |= {name: ones for name, _, _ in COLUMNS if name not in of_one["metrics"]}
    found = results.summarize(sweep, records)
    pairs = {"pairs": {"test": 9}, "signatures": {"bleu": "", "chrf": ""}}
    table.show(terminal(), found | pairs)
    printed = capsys.readouterr().out
    assert printed.count("3 values cover their mean in at most about 75% of cases.") == 1
    assert "3 seeds are too few" in printed and "no difference shown" not in printed


def test_where_everything_diverged_nothing_is_compared():
    sweep = parse(["--scores=dot", "--learning_rate=0.1,0.2,0.3"])
    found = results.summarize(sweep, [diverged("dot", {}, rate) for rate in sweep.rates])
    assert found["mechanisms"] == found["comparisons"] == []
    assert found["conclusion"].startswith(
        "There are no two scores to compare. dot: diverged at every learning rate, and not "
        "compared."
    )


def test_the_tidy_table_has_a_row_for_every_run_and_seed():
    sweep = parse(["--scores=dot", "--learning_rate=0.1,0.2", "--seeds=2", "--width=4,8"])
    points = [{"width": 4}, {"width": 8}]
    records = [record("dot", point, 0.1, 1.0, (7.0, 9.0)) for point in points]
    records += [diverged("dot", point, 0.2) for point in points]
    text = table.csv_table(results.summarize(sweep, records), records)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(r["width"], r["learning_rate"], r["seed"], r["chosen"], r["bleu"]) for r in rows] == [
        ("4", "0.1", "0", "true", "7.0"),
        ("4", "0.1", "1", "true", "9.0"),
        ("8", "0.1", "0", "true", "7.0"),
        ("8", "0.1", "1", "true", "9.0"),
        ("4", "0.2", "0", "false", ""),
        ("4", "0.2", "1", "false", ""),
        ("8", "0.2", "0", "false", ""),
        ("8", "0.2", "1", "false", ""),
    ]
    assert rows[0]["alignment_error"] == ""
    assert [row["diverged"] for row in rows] == 4 * ["false"] + 4 * ["true"]

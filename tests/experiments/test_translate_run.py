"""The main job as a user meets it: one line for a bad request, a tiny run, and its resumption."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.translate import run as whole_run
from experiments.translate.__main__ import main

ROOT = Path(__file__).parents[2]
TINY = (
    "--data=copy",
    "--train_size=200",
    "--valid_size=20",
    "--test_size=20",
    "--width=8",
    "--attention_size=4",
    "--seeds=2",
    "--steps=50",
    "--batch_size=8",
)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--scores=cosin", r"--scores: there is no score 'cosin'; choose from additive, .*none.*"),
        ("--zzzz=1", "unknown flag --zzzz; --help lists all flags."),
        ("--batch_size=0", "--batch_size is 0, but a whole number of at least 1 is needed."),
        ("--learning_rate=nan", "--learning_rate is nan, but a finite number above 0 is needed."),
        ("--dropout=1.5", r"--dropout is 1.5, but a number in \[0, 1\) is needed."),
        (
            "--data=/no/where.tsv",
            "/no/where.tsv does not exist: .*check the spelling and the path.",
        ),
    ],
)
def test_a_bad_request_is_one_sentence_and_touches_nothing(flag, sentence, tmp_path, capsys):
    assert main([flag, f"--workdir={tmp_path}/run"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert re.fullmatch(f"translate: {sentence}", printed.err.rstrip("\n"))
    assert list(tmp_path.iterdir()) == []


def test_help_answers_without_jax():
    code = (
        "import sys; from experiments.translate.__main__ import main; main(['--help']); "
        "print('jax' in sys.modules)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "--scores" in printed
    assert printed.rstrip().endswith("False")


def run(*flags):
    command = [sys.executable, "-m", "experiments.translate", *TINY, *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translate") / "run"
    done = run(f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().splitlines()[-1] == f"{folder}/report.html"
    return folder


@pytest.mark.slow
def test_a_run_leaves_results_figures_and_a_report_that_needs_no_network(finished):
    results = json.loads((finished / "results.json").read_text(encoding="utf-8"))
    assert [row["score"] for row in results["mechanisms"]] == ["additive", "scaled_dot"]
    for row in results["mechanisms"]:
        assert row["parameters"] > 0
        assert {"exact_match", "bleu", "chrf", "alignment_error"} <= set(row["metrics"])
        assert len(row["metrics"]["bleu"]["values"]) == 2
    assert results["comparisons"]
    for name in ("learning_curves", "alignment_1"):
        for kind in ("png", "svg"):
            assert (finished / "figures" / f"{name}.{kind}").stat().st_size > 1000
    report = (finished / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"(?:src|href)=.https?:", report) == []
    assert "data:image/" in report or "<svg" in report


@pytest.mark.slow
def test_the_same_command_again_trains_nothing_and_says_the_same(finished):
    before = (finished / "results.json").read_text(encoding="utf-8")
    lines = (finished / "metrics.jsonl").read_text(encoding="utf-8")
    assert run(f"--workdir={finished}").returncode == 0
    assert (finished / "metrics.jsonl").read_text(encoding="utf-8") == lines
    ours, theirs = json.loads(before), json.loads((finished / "results.json").read_text("utf-8"))
    for first, second in zip(ours["mechanisms"], theirs["mechanisms"], strict=True):
        assert first["metrics"] == second["metrics"]


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused(finished):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    refused = run("--width=16", f"--workdir={finished}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_disk_that_is_full(monkeypatch, tmp_path, capsys, translate):
    def full(config, console):
        raise OSError(28, "No space left on device", f"{config.workdir}/metrics.jsonl")

    monkeypatch.setattr(whole_run, "prepare", full)
    assert translate(f"--workdir={tmp_path}/run") == 1
    assert capsys.readouterr().err == (
        f"translate: {tmp_path}/run/metrics.jsonl: No space left on device; what was saved before "
        "is kept.\n"
    )


@pytest.mark.slow
def test_what_was_left_out_is_counted(done):
    folder = done[1]
    notices = json.loads((folder / "results.json").read_text("utf-8"))["data"]["notices"]
    report = (folder / "report.html").read_text("utf-8")
    for notice in (
        "lines with an empty sentence were skipped: 1, the first is line 4.",
        "train: 1 of 124 pairs are longer than max_length=8 tokens and were dropped.",
        "table.tsv has gold alignments, so it was split at spaces only.",
    ):
        assert any(given.endswith(notice) for given in notices)
        assert notice in report


@pytest.mark.slow
def test_gold_alignments_of_the_third_column_are_measured(done):
    folder = done[1]
    (dot,) = json.loads((folder / "results.json").read_text("utf-8"))["mechanisms"]
    assert 0 <= dot["metrics"]["alignment_error"]["mean"] <= 100
    (gold,) = {
        picture["gold"]
        for path in (folder / "outcomes").iterdir()
        for picture in json.loads(path.read_text("utf-8"))["pictures"]
    }
    assert gold == "0-1 1-2 2-0"


@pytest.mark.slow
def test_the_report_of_one_seed_speaks_of_no_interval(done):
    report = (done[1] / "report.html").read_text("utf-8")
    assert "One seed, so that there is no interval." in report
    assert "bootstrap" not in report

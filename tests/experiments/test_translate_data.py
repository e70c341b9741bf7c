"""The main job on files of the user: errors are one line, and what is left out is counted."""

import json
import re

import numpy as np
import pytest

from experiments.data.vocabulary import PAD
from experiments.translate import run
from experiments.translate.config import Config
from experiments.translate.data import load_task


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a\tb\nc\xe9\td\n", r"\S+ line 2 is not UTF-8 \(byte 0xe9\); .*iconv.*"),
        ("a\tb\n".encode("utf-16"), r"\S+ line 1 begins with the mark of UTF-16.*"),
        (b"a\tb\nno tab\n", r"\S+ line 2 has no tab, .*"),
        (b"", r"\S+ is empty, but lines of text were expected; give another file\."),
        (b"\t\n\n \t \n", r"\S+: no line has both sentences; .*"),
        (b"a b c\td e f\n" * 9, r".* cannot be split into train, valid and test; .*"),
        (b"a\tb\nc\td\0\n", r"\S+ line 2 has a NUL byte, so the file is binary or UTF-16, .*"),
        (bytes(range(256)), r"\S+ line 1 has a NUL byte, so the file is binary or UTF-16, .*"),
        (b"a\tb\n", r"\S+ has 1 different source sentence, which cannot be split into .*"),
        (b"a b\tc d\t7-7\n" * 9, r"\S+ line 1: the alignment links 7 to 7, .*"),
    ],
)
def test_a_corpus_that_cannot_be_used(content, sentence, tmp_path, capsys, translate):
    (tmp_path / "corpus.tsv").write_bytes(content)
    assert translate(f"--data={tmp_path}/corpus.tsv", f"--workdir={tmp_path}/run") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"translate: {sentence}\n", printed.err)
    assert not (tmp_path / "run").exists()


PAIRS = "".join(f"{n} a b\tc d {n}\n" for n in range(9))


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--max_length=2",
            r"train: all 9 pairs are longer than max_length=2 tokens \(the .* 3\); .*",
        ),
        (
            "--batch_size=8",
            "batch_size is 8, but there are only 7 pairs to train on; set a smaller .*",
        ),
        ("--min_count=99", r"\S+: no word occurs min_count=99 times in the 7 training pairs; .*"),
        ("--source=2", r"\S+: source '2' and target 'de' are the same column; .*"),
    ],
)
def test_flags_that_leave_nothing_to_train_on(flag, sentence, tmp_path, capsys, translate):
    (tmp_path / "corpus.tsv").write_text(PAIRS)
    assert translate(f"--data={tmp_path}/corpus.tsv", flag, f"--workdir={tmp_path}/run") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"translate: {sentence}\n", printed.err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.encode("utf-8-sig"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.removesuffix("\n").encode(),
        lambda text: text.replace(" a ", " \u2028a\x85 ").encode(),
    ],
    ids=["bom", "crlf", "no-final-newline", "unicode-line-ends"],
)
def test_harmless_differences_give_the_same_task(change, tmp_path):
    tasks = []
    for name, content in (("plain", PAIRS.encode()), ("changed", change(PAIRS))):
        (tmp_path / f"{name}.tsv").write_bytes(content)
        config = Config(data=f"{tmp_path}/{name}.tsv", batch_size=2, min_count=1, steps=25)
        tasks.append(load_task(config))
    first, second = tasks
    for ours, theirs in zip(first.training.members, second.training.members, strict=True):
        assert ours.source.tolist() == theirs.source.tolist()
        assert ours.target.tolist() == theirs.target.tolist()
    assert first.rows.tolist() == second.rows.tolist()
    assert first.corpus.test == second.corpus.test


def test_no_batch_has_more_words_than_are_read_out():
    given = load_task(Config(data="copy", train_size=900, steps=50, batch_size=12, seeds=2))
    most = [0] * len(given.max_words)
    for bucket, rows in zip(given.order, given.rows, strict=True):
        words = np.asarray(given.arrays[bucket][1])[rows] != PAD
        most[bucket] = max(most[bucket], words.sum(axis=(2, 3)).max())
    slots = [12 * width for _, width in given.training.widths]
    for found, bound, held in zip(most, given.max_words, slots, strict=True):
        assert found <= bound <= min(found + 31, held)


def test_a_folder_where_a_table_was_expected(tmp_path, capsys, translate):
    (tmp_path / "corpus.tsv").mkdir()
    assert translate(f"--data={tmp_path}/corpus.tsv", f"--workdir={tmp_path}/run") == 2
    said = capsys.readouterr().err
    assert said.endswith("is a folder where a .tsv file was expected; name a file.\n")


def test_files_of_unequal_length(tmp_path, capsys, translate):
    (tmp_path / "train.en").write_text("a\nb\nc\n")
    (tmp_path / "train.de").write_text("a\nb\n")
    assert translate(f"--data={tmp_path}", f"--workdir={tmp_path}/run") == 2
    assert re.fullmatch(
        r"translate: \S+/train.en has 3 lines but \S+/train.de has 2; line n of one must translate "
        r"line n of the other\.\n",
        capsys.readouterr().err,
    )


def test_a_folder_that_cannot_be_had(tmp_path, capsys, translate):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    for folder, sentence in {
        "file": "is a file, not a folder",
        "file/below": rf"cannot be created in {tmp_path}/file",
        "full": "holds other files and no run",
    }.items():
        assert translate(f"--workdir={tmp_path}/{folder}") == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        said = rf"translate: --workdir {tmp_path}/{folder} {sentence}; give another --workdir\.\n"
        assert re.fullmatch(said, printed.err)
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["a[1]", "a*", "a?/run"])
def test_a_folder_in_which_no_checkpoint_could_be_saved(name, tmp_path, capsys, translate):
    assert translate(f"--workdir={tmp_path}/{name}") == 2
    assert capsys.readouterr().err == (
        f"translate: --workdir {tmp_path}/{name} has a {name[1]} in its path, but checkpoints can "
        "be saved only in a path without *, ? and [; give another --workdir.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(monkeypatch, tmp_path, capsys, translate):
    def full(config, console):
        raise OSError(28, "No space left on device", f"{config.workdir}/metrics.jsonl")

    monkeypatch.setattr(run, "prepare", full)
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


def test_the_report_of_one_seed_speaks_of_no_interval(done):
    report = (done[1] / "report.html").read_text("utf-8")
    assert "One seed, so that there is no interval." in report
    assert "bootstrap" not in report

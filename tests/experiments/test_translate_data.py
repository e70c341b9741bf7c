"""The main job on files of the user: errors are one line, and what is left out is counted."""

import json
import re

import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.data import Sizes, load
from experiments.data.vocabulary import PAD
from experiments.files import unsealed, write_sealed
from experiments.translate.config import Config
from experiments.translate.data import load_task, load_tokenizer, save_tokenizer


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
    for shares in (1, 3):
        most = [0] * len(given.training.members)
        for bucket, rows in zip(given.order, given.rows, strict=True):
            words = np.asarray(given.arrays[bucket][1])[rows] != PAD
            parts = words.reshape(*words.shape[:2], shares, -1)
            most[bucket] = max(most[bucket], parts.sum(axis=-1).max())
        slots = [12 // shares * width for _, width in given.training.widths]
        for found, bound, held in zip(most, given.max_words(shares), slots, strict=True):
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


def sentence(call):
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


LINES = {"en": "a b\n" * 3 + "b a\nc a\nc b\n", "de": "x y\n" * 3 + "y x\nz x\nz y\n"}


@pytest.fixture
def begun(tmp_path):
    """The folder of a run that has begun, that of its data, and how it goes on."""
    run, data = tmp_path / "run", tmp_path / "data"
    run.mkdir()
    data.mkdir()
    for ending, text in LINES.items():
        (data / f"train.{ending}").write_text(text)
        (data / f"test.{ending}").write_text(text)

    def go_on():
        config = Config(data=str(data), min_count=1)
        save_tokenizer(run, load(str(data), min_count=1), 9, config)

    go_on()
    return run, data, go_on


def test_a_run_goes_on_with_the_files_that_it_began_with(begun):
    run, data, go_on = begun
    before = content(run)
    go_on()
    ending = f"since the run in {run} began; restore the data as they were or give another "
    (data / "train.de").write_text(LINES["de"].replace("z y", "y z"))
    assert sentence(go_on) == f"{data}/train.de has changed {ending}--workdir."
    (data / "train.de").write_text(LINES["de"])
    for ending_of_file, text in LINES.items():
        (data / f"valid.{ending_of_file}").write_text(text)
    assert sentence(go_on) == f"{data}/valid.en is new {ending}--workdir."
    for path in data.glob("valid.*"):
        path.unlink()
    for path in data.glob("test.*"):
        path.unlink()
    assert sentence(go_on) == f"{data}/test.en is gone {ending}--workdir."
    assert content(run) == before


def test_a_run_that_kept_no_record_of_its_data_goes_on(begun):
    run, data, go_on = begun
    (run / "data.json").unlink()
    (data / "test.de").write_text(LINES["de"].replace("z y", "y z"))
    go_on()
    assert not (run / "data.json").exists()


def test_a_damaged_record_of_the_data(begun):
    run, _, go_on = begun
    (run / "data.json").write_text("{")
    assert sentence(go_on) == (
        f"{run}/data.json is damaged; delete it if the data are those that the run began with."
    )


def test_files_of_another_run_are_not_taken_for_those_of_this_one(begun):
    run, _, go_on = begun
    write_sealed(run / "config.json", {"run": "another mark"})
    assert sentence(lambda: load_tokenizer(run)) == (
        f"{run}/vocabularies.json was written by another run; the run's command writes it anew."
    )
    assert sentence(go_on) == (
        f"{run}/data.json was written by another run; restore the one of this run from a copy, or "
        "delete it if the data are those that the run began with."
    )
    (run / "data.json").unlink()
    go_on()
    load_tokenizer(run)


def test_generated_data_need_no_record(tmp_path):
    corpus = load("copy", sizes=Sizes(train=9, valid=1, test=1))
    save_tokenizer(tmp_path, corpus, 9, Config(data="copy"))
    assert [path.name for path in tmp_path.iterdir()] == ["vocabularies.json"]


def test_damaged_vocabularies_are_written_anew_and_others_are_refused(begun):
    run, data, go_on = begun
    path = run / "vocabularies.json"
    before = path.read_text("utf-8")
    for damaged in (before[: len(before) // 2], "", "[]", "{}"):
        path.write_text(damaged)
        assert sentence(lambda: load_tokenizer(run)) == (
            f"{path} is damaged; the run's command writes it anew."
        )
        go_on()
        assert path.read_text("utf-8") == before
    held = json.loads(before)
    swapped = {**held, "source": held["source"][::-1]}
    assert swapped != held
    path.write_text(json.dumps(swapped))
    assert sentence(lambda: load_tokenizer(run)).startswith(f"{path} is damaged; "), "by its seal"
    write_sealed(path, unsealed(held) | {"source": held["source"][::-1]})
    assert sentence(go_on) == (
        f"{path} does not hold the words of --data={data}, so that the run began with others; "
        "restore them or give another --workdir."
    )

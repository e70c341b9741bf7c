"""What a run keeps beside its parameters: it goes on with the data that it began with, or not."""

import json
import shutil

import pytest

from experiments.command_line import UsageError
from experiments.data import Sizes, load
from experiments.translate.config import Config
from experiments.translate.data import load_tokenizer, save_tokenizer
from experiments.translate.workdir import Log

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


def sentence(call):
    with pytest.raises(UsageError) as error:
        call()
    return str(error.value)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    path.write_text(before.replace('"z"', '"w"'))
    assert sentence(go_on) == (
        f"{path} does not hold the words of --data={data}, so that the run began with others; "
        "restore them or give another --workdir."
    )


@pytest.fixture
def copied(done, tmp_path, translate, capsys):
    """The folder of a finished run, and a command on it that returns its code and its errors."""
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder, ignore=shutil.ignore_patterns("figures"))

    def command(*flags):
        code = translate(*(flags or done[0]), f"--workdir={folder}")
        said = capsys.readouterr()
        return code, said.err.removeprefix("translate: ").rstrip("\n")

    return folder, command


@pytest.mark.slow
def test_changed_data_are_not_evaluated_on(copied, done):
    folder, command = copied
    held = json.loads((folder / "data.json").read_text("utf-8"))
    ((path, _),) = held.items()
    (folder / "data.json").write_text(json.dumps({path: "other"}))
    before = content(folder)
    said = (
        f"{path} has changed since the run in {folder} began; restore the data as they were or "
        "give another --workdir."
    )
    assert command() == command("--mode=evaluate") == (2, said)
    assert content(folder) == before
    assert command("--mode=evaluate", f"--input={path}")[0] == 0


@pytest.mark.parametrize("text", ['{"config": {"scores"', "[1]", '{"config": [1]}'])
def test_a_damaged_configuration(text, copied):
    folder, command = copied
    (folder / "config.json").write_text(text)
    assert command("--mode=evaluate") == (
        2,
        f"{folder}/config.json is damaged; restore it from a copy, or train again in another "
        "--workdir.",
    )
    assert command() == (
        2,
        f"{folder}/config.json is not the configuration of a run; give another --workdir.",
    )


@pytest.mark.slow
def test_a_damaged_outcome_is_measured_again_when_it_is_deleted(copied):
    folder, command = copied
    path = folder / "outcomes" / "dot.json"
    whole = json.loads(path.read_text("utf-8"))
    path.write_text(path.read_text("utf-8")[:99])
    assert command() == (
        2,
        f"{path} is damaged; delete it, and the same command measures again what was trained.",
    )
    path.unlink()
    assert command() == (0, "")
    assert json.loads(path.read_text("utf-8"))["sets"] == whole["sets"]


@pytest.mark.parametrize("damaged", [b'{"score": "dot', b"[]", b"{}", b"\xff", b""])
def test_a_damaged_line_of_the_log(damaged, tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    whole = b'{"score": "dot", "step": 1}\n'
    log.path.write_bytes(whole + damaged + b"\n" + whole)
    said = f"{log.path} line 2 is damaged; delete that line, and the same command goes on."
    assert sentence(lambda: log.records("dot")) == sentence(lambda: log.rewind("dot", 1)) == said
    log.path.write_bytes(whole + damaged)
    assert log.records("dot") == [{"score": "dot", "step": 1}]


@pytest.mark.slow
def test_a_log_that_was_lost_is_told_before_anything_is_done(copied):
    folder, command = copied
    (folder / "metrics.jsonl").unlink()
    before = content(folder)
    said = (
        f"{folder}/metrics.jsonl lacks the measurements of training dot; restore it from a copy, "
        "or train again in another --workdir."
    )
    assert command() == (2, said)
    assert content(folder) == before
    (folder / "outcomes" / "dot.json").unlink()
    assert command() == (2, said)
    assert not (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize("held", ["exact_match", "tokens"])
def test_a_log_needs_steps_and_validations(held, tmp_path):
    log = Log(tmp_path / "metrics.jsonl")
    log.append({"score": "dot", "step": 1, held: 1})
    assert sentence(lambda: log.complete_records("dot")).startswith(
        f"{log.path} lacks the measurements of "
    )
    log.append({"score": "dot", "step": 2, "tokens": 1, "exact_match": [1.0]})
    assert len(log.complete_records("dot")) == 2

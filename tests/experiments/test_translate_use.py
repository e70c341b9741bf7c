"""A trained run evaluates, translates and scores; what it says is what training measured."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.files import unsealed, write_sealed
from experiments.metrics import signatures
from experiments.translate import use, workdir
from experiments.translate.config import Config
from experiments.translate.table import EVALUATION_COLUMNS
from experiments.translate.use import report_evaluation
from experiments.translate_sweep.config import Sweep


@pytest.fixture
def ask(done, monkeypatch, capsys, translate):
    """Run a mode on the small run, with bytes as standard input; return code and what it says."""

    def run(mode, *flags, stdin=b"", folder=done[1]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = translate(f"--mode={mode}", f"--workdir={folder}", *flags)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def samples(done):
    outcome = json.loads((done[1] / "outcomes" / "dot.json").read_text("utf-8"))
    return [{k: " ".join(v) for k, v in sample.items()} for sample in outcome["samples"]]


@pytest.mark.slow
def test_evaluation_finds_what_training_found(done, ask):
    code, out, err = ask("evaluate")
    assert (code, err) == (0, "")
    path = done[1] / "evaluations" / "test.json"
    assert out.splitlines()[-1] == str(path)
    assert "greedy decoding. One seed" in out and "BLEU nrefs:1" in out
    (found,) = json.loads(path.read_text("utf-8"))["scores"]
    (dot,) = json.loads((done[1] / "results.json").read_text("utf-8"))["mechanisms"]
    for name in ("exact_match", "bleu", "chrf", "alignment_error", "sure_found", "links_wrong"):
        assert found[name] == dot["metrics"][name]
    np.testing.assert_allclose(
        found["loss"]["mean"], dot["metrics"]["test_loss"]["mean"], rtol=1e-4
    )
    assert found["possible_found"] is None and found["step"] == 4000


@pytest.mark.slow
def test_a_translation_that_is_one_of_several_references_is_perfect(done, ask, tmp_path):
    path = done[1] / "translations" / "dot.seed0.txt"
    code, out, _ = ask("evaluate", f"--references={path}")
    assert code == 0 and "BLEU nrefs:2" in out and "chrF nrefs:2" in out
    found = json.loads((done[1] / "evaluations" / "test-references.json").read_text("utf-8"))
    (dot,) = found["scores"]
    for name in ("chrf", "chrf_plus_plus"):  # three words are too few for BLEU
        assert dot[name]["mean"] == pytest.approx(100)
    (tmp_path / "few.txt").write_text("one two three\n")
    count = len(path.read_text("utf-8").splitlines())
    code, out, err = ask("evaluate", f"--references={tmp_path}/few.txt")
    assert (code, out) == (2, "")
    assert err == (
        f"translate: --references: {tmp_path}/few.txt has 1 lines, but test has {count} pairs; "
        "line n must be a reference of pair n.\n"
    )


def test_comet_that_is_not_installed(tmp_path):
    config = Config(mode="evaluate", comet="wmt22", workdir=str(tmp_path))
    with pytest.raises(UsageError) as error:
        use.use(config)
    assert str(error.value) == (
        "--comet needs the package unbabel-comet; install it, or leave it out."
    )


@pytest.mark.slow
def test_translation_goes_line_by_line(ask, samples, tmp_path):
    lines = [samples[0]["source"], "", f"{samples[1]['source']} zebra", samples[2]["source"]]
    stdin = "\n".join(lines).encode()
    code, out, err = ask("translate", f"--alignments={tmp_path}/links", stdin=stdin)
    assert code == 0
    assert err == "translate: line 3: read as <unk>: zebra (source)\n"
    found = out.split("\n")
    assert len(found) == 5 and found[1] == found[4] == ""
    assert [found[0], found[3]] == [samples[0]["translation"], samples[2]["translation"]]
    links = (tmp_path / "links").read_text("utf-8").split("\n")
    assert len(links) == 5 and links[1] == ""
    for line, source, target in zip(links, lines, found, strict=False):
        pairs = [tuple(map(int, link.split("-"))) for link in line.split()]
        assert all(i < len(source.split()) and j < len(target.split()) for i, j in pairs)


@pytest.mark.slow
def test_scores_are_the_losses_of_an_evaluation(ask, samples, tmp_path):
    table = "".join(f"{s['source']}\t{s['target']}\t0-0\n" for s in samples)
    (tmp_path / "pairs.tsv").write_text(table, "utf-8")
    code, out, err = ask("score", f"--input={tmp_path}/pairs.tsv")
    assert code == 0
    told = rf"alignment error .*; pairs with a gold alignment in the third column: {len(samples)}\."
    assert re.fullmatch(f"translate: {told}\n", err)
    scores = [float(line) for line in out.splitlines()]
    assert len(scores) == len(samples) and max(scores) <= 0
    code, out, _ = ask("evaluate", f"--input={tmp_path}/pairs.tsv")
    assert code == 0
    found = json.loads(Path(out.splitlines()[-1]).read_text("utf-8"))
    tokens = sum(len(s["target"].split()) + 1 for s in samples)
    np.testing.assert_allclose(found["scores"][0]["loss"]["mean"], -sum(scores) / tokens, rtol=1e-3)


@pytest.mark.slow
def test_a_blank_line_is_scored_by_a_blank_line(ask, tmp_path):
    lines = ["one two\tone two", "", "two\ttwo", " \t"]
    code, out, err = ask("score", f"--alignments={tmp_path}/links", stdin="\n".join(lines).encode())
    assert (code, err) == (0, "")
    first, blank, third, last, end = out.split("\n")
    assert float(first) < 0 and float(third) < 0 and blank == last == end == ""
    links = (tmp_path / "links").read_text("utf-8").split("\n")
    assert len(links) == 5 and links[1] == links[3] == "" and links[0] and links[2]
    code, alone, _ = ask("score", stdin=b"two\ttwo")
    assert alone == f"{third}\n"
    assert ask("score", stdin=b"\n\n") == (0, "\n\n", "")
    assert ask("score", stdin=b"two ||| two") == (0, alone, "")
    code, _, err = ask("score", stdin=b"two ||| two\nthree\n")
    assert code == 2 and err == (
        "translate: standard input line 2 has no ||| between two sentences, but source|||target is "
        "needed, or a blank line.\n"
    )


@pytest.mark.slow
def test_long_and_many_unknown_words_are_told_shortly(ask):
    line = " ".join([20_000 * "z", *(f"u{n}" for n in range(50))])
    code, _, err = ask("score", stdin=f"{line}\tone\n".encode())
    listed = " ".join(f"u{n}" for n in range(9))
    assert code == 0 and err == (
        f"translate: line 1: read as <unk>: {40 * 'z'}... (20,000 characters) {listed} and 41 more "
        "(source)\n"
    )


@pytest.mark.slow
def test_a_table_of_the_other_direction_is_turned(done, ask, samples, tmp_path):
    table, turned = tmp_path / "pairs.tsv", tmp_path / "turned.tsv"
    table.write_text("".join(f"{s['source']}\t{s['target']}\n" for s in samples), "utf-8")
    turned.write_text("".join(f"{s['target']}\t{s['source']}\n" for s in samples), "utf-8")
    losses = []
    for path, flags in ((table, ()), (turned, ("--source=2", "--target=1"))):
        code, out, err = ask("evaluate", f"--input={path}", *flags)
        assert code == 0, err
        (found,) = json.loads(Path(out.splitlines()[-1]).read_text("utf-8"))["scores"]
        losses.append(found["loss"])
    assert losses[0] == losses[1]
    assert out.splitlines()[-1].endswith("-2-1.json"), "beside that of the table as it stands"
    code, _, err = ask("evaluate", "--source=2", "--target=1")
    assert code == 2 and "--source is 2, but the run in" in err, "the run's own data stay"


@pytest.mark.slow
def test_words_that_are_not_known_are_told_with_their_side(ask):
    code, out, err = ask("score", stdin=b"one zebra\tzebra one emu zebra\none\temu\n")
    assert code == 0 and out.count("\n") == 2
    assert err == (
        "translate: line 1: read as <unk>: zebra (source), zebra emu (target)\n"
        "translate: line 2: read as <unk>: emu (target)\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("links", [("", ""), ("\t2 0 1", "\t2-0")])
@pytest.mark.parametrize(("at_spaces", "words"), [(True, 8), (False, 9)])
def test_a_table_is_cut_into_words_as_the_training_was(
    at_spaces, words, links, done, ask, tmp_path
):
    """At spaces and cased, as text with gold alignments is, or not, whatever the table has."""
    folder, table = tmp_path / "run", tmp_path / "table.tsv"
    shutil.copytree(done[1], folder)
    held = json.loads((folder / "vocabularies.json").read_text("utf-8"))
    changed = {**unsealed(held), "at_spaces": at_spaces}
    write_sealed(folder / "vocabularies.json", changed)
    lines = ["One, two three\tthree one Two", "four five five\tFive four five."]
    table.write_text("".join(f"{a}{b}\n" for a, b in zip(lines, links, strict=True)))
    scores = ask("score", f"--input={table}", folder=folder)[1].split()
    code, out, err = ask("evaluate", f"--input={table}", folder=folder)
    assert code == 0
    assert f"BLEU nrefs:1|case:{'mixed' if at_spaces else 'lc'}" in out
    found = json.loads(Path(out.splitlines()[-1]).read_text("utf-8"))["scores"][0]
    np.testing.assert_allclose(found["loss"]["mean"], -sum(map(float, scores)) / words, rtol=1e-3)
    assert (found["alignment_error"] is not None) == (at_spaces and links[0] != "")
    sentence = (
        "translate: table.tsv: gold alignments that count other words than the vocabularies do "
        "were left out: 2, the first is that of line 1.\n"
    )
    assert (sentence in err) == (not at_spaces and links[0] != "")


@pytest.mark.slow
def test_evaluations_of_other_sets_or_decodings_keep_their_own_files(done, ask, samples, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder, ignore=shutil.ignore_patterns("evaluations"))
    for name, sample in (("a", samples[0]), ("b", samples[1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.tsv").write_text(f"{sample['source']}\t{sample['target']}\n")
        assert ask("evaluate", f"--input={tmp_path}/{name}/test.tsv", folder=folder)[0] == 0
    for flags in (
        [],
        ["--split=valid"],
        ["--beam_size=3"],
        ["--beam_size=3", "--length_penalty=1"],
    ):
        assert ask("evaluate", *flags, folder=folder)[0] == 0
    names = sorted(path.name for path in (folder / "evaluations").iterdir())
    assert names[2:] == [
        "test-beam3-penalty0.6.json",
        "test-beam3-penalty1.json",
        "test.json",
        "valid.json",
    ]
    assert all(re.fullmatch(r"input-test-[0-9a-f]{8}\.json", name) for name in names[:2])


def test_evaluations_of_other_scores_share_a_file(tmp_path, capsys):
    def report(step, *scores):
        config = Config(seeds=2, scores=scores, workdir=str(tmp_path))
        columns = {name: [float(step), 0.0] for name, _, _ in EVALUATION_COLUMNS}
        records = [{"score": score, "step": step, **columns} for score in scores]
        about = {"set": "test", "pairs": 3, "signatures": signatures()}
        path = report_evaluation(config, about, records)
        assert ("none" in capsys.readouterr().out) == ("none" in scores)
        return path, json.loads(path.read_text("utf-8"))

    path, _ = report(5, "dot", "none")
    _, found = report(9, "additive", "dot")
    assert [(row["score"], row["step"]) for row in found["scores"]] == [
        ("additive", 9),
        ("dot", 9),
        ("none", 5),
    ]
    assert found["config"]["scores"] == ["additive", "dot", "none"]
    assert found["scores"][2]["loss"]["mean"] == 2.5
    path.write_text("{")
    assert len(report(5, "none")[1]["scores"]) == 1
    assert len(report(5, "dot")[1]["scores"]) == 2
    write_sealed(tmp_path / "config.json", {"run": "the mark of another run"})
    assert len(report(5, "additive")[1]["scores"]) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC])
@pytest.mark.parametrize("call", ["write_marked", "Path.mkdir"])
def test_an_evaluation_of_a_run_that_is_not_to_be_written_to_is_printed(
    number, call, tmp_path, monkeypatch, capsys
):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "evaluations"))

    owner = use if call == "write_marked" else Path
    monkeypatch.setattr(owner, call.rpartition(".")[2], refuse)
    config = Config(seeds=1, scores=("dot",), workdir=str(tmp_path))
    record = {"score": "dot", "step": 7, **{name: [0.5] for name, _, _ in EVALUATION_COLUMNS}}
    about = {"set": "test", "pairs": 3, "signatures": signatures()}
    if number == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            report_evaluation(config, about, [record])
        return
    assert report_evaluation(config, about, [record]) is None
    said = capsys.readouterr()
    assert "dot" in said.out and said.err == (
        f"translate: {tmp_path}/evaluations: {os.strerror(number)}; the evaluation is printed and "
        "not kept.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode", ["translate", *(pytest.param(x, marks=pytest.mark.slow) for x in ("score", "evaluate"))]
)
def test_a_reader_of_the_answers_may_stop_early(mode, done, samples, tmp_path):
    (tmp_path / "pairs.tsv").write_text(f"{samples[0]['source']}\t{samples[0]['target']}\n")
    command = (f"--mode={mode}", f"--workdir={done[1]}", f"--input={tmp_path}/pairs.tsv")
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.translate", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        program.stdout.close()
        said = program.stderr.read()
        assert program.wait() == 0
    assert b"Broken pipe" not in said and b"Traceback" not in said


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(done, ask, samples, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder)
    checkpoints = folder / "checkpoints" / "dot"
    shutil.copytree(checkpoints / "00004000", checkpoints / "00003000")
    (checkpoints / "00004000.seal").rename(checkpoints / "00003000.seal")
    (checkpoints / "00004000.seal").write_text("{}")
    code, out, err = ask("translate", stdin=samples[0]["source"].encode(), folder=folder)
    assert code == 0 and out.count("\n") == 1
    first, second = err.splitlines()
    assert first.endswith("is damaged: skipped.")
    assert second == "translate: dot: the checkpoint is of step 3000 of 4000."
    shutil.rmtree(folder / "checkpoints")
    code, out, err = ask("translate", stdin=b"one", folder=folder)
    assert (code, out) == (2, "")
    assert err.endswith("checkpoints/dot holds no checkpoint; train the run first.\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "stdin", "sentence"),
    [
        (["score"], b"\none", "standard input line 2 has no tab between two sentences, but source"),
        (["score"], b"one\t \t0-0", "standard input line 1 has nothing behind its tab, but source"),
        (["score"], b" \tone", "standard input line 1 has nothing before its tab, but source<TAB>"),
        (["translate"], b"a\nb\xff", "standard input line 2 is not UTF-8 (byte 0xff); if the"),
        (["translate"], b"a\0b", "standard input line 1 has a NUL byte, so the file is binary"),
        (["translate"], "a".encode("utf-16"), "standard input line 1 begins with the mark of UTF-"),
        (["translate", "--input=/no/file"], b"", "/no/file does not exist; check the path."),
        (["translate", "--input=/dev/null"], b"", "/dev/null is empty, but lines of text were"),
        (["evaluate", "--input=/tmp"], b"", "--input /tmp is not a file; give a table of pairs"),
        (["evaluate", "--split=dev"], b"", "--split: there is no 'dev'; choose from valid, test"),
        (["evaluate", "--scores=additive"], b"", "--scores: {} holds no additive, only dot."),
        (["evaluate", "--width=8"], b"", "--width is 8, but the run in {} has 4; leave it out."),
        (["translate", "--alignments=/no/folder"], b"a", "--alignments /no/folder cannot be writ"),
        (["translate", "--alignments=/tmp"], b"a", "--alignments /tmp cannot be written: it is a"),
        (["evaluate", "--alignments=x"], b"", "--alignments is for --mode=translate or score;"),
        (["translate", "--split=valid"], b"", "--split is for --mode=evaluate; leave it out."),
        (["translate", "--beam_size=0"], b"", "--beam_size is 0, but a whole number of at least"),
        (["translate", "--length_penalty=nan"], b"", "--length_penalty is nan, but a number in "),
        (["translate", "--length_penalty=400"], b"", "--length_penalty is 400.0, but a number in "),
        (["translate", "--translator=1"], b"", "--translator is 1, but the seeds are 1."),
        (["evaluate", "--split=test", "--input=x"], b"", "--split and --input both say what to ev"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(flags, stdin, sentence, done, ask):
    code, out, err = ask(*flags, stdin=stdin)
    assert (code, out) == (2, "")
    assert err.startswith("translate: " + sentence.format(done[1]))
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_folder_without_a_run(ask, tmp_path):
    assert ask("translate", folder=tmp_path)[2] == (
        f"translate: --workdir {tmp_path} holds no run that can translate (config.json is "
        "missing); train one first, or give another.\n"
    )
    (tmp_path / "config.json").write_text("[]")
    assert ask("translate", folder=tmp_path)[2].startswith(f"translate: {tmp_path}/config.json ")


@pytest.mark.slow
def test_the_folder_of_a_sweep_is_none_of_a_run(ask, tmp_path):
    sweep = Sweep(Config(workdir=str(tmp_path)), {})
    with workdir.opened(sweep):
        pass
    assert ask("evaluate", folder=tmp_path) == (
        2,
        "",
        f"translate: --workdir {tmp_path} holds a sweep, not a run; give one of the folders "
        f"in {tmp_path}/runs.\n",
    )


@pytest.fixture
def unfinished(done, tmp_path):
    """A run of two scores, of which one was trained, as a sweep of matched scores has them."""
    folder = tmp_path / "run"
    shutil.copytree(done[1], folder, ignore=shutil.ignore_patterns("evaluations"))
    held = unsealed(json.loads((folder / "config.json").read_text("utf-8")))
    held["config"]["scores"] = ["additive", "dot"]
    write_sealed(folder / "config.json", held)
    return folder


@pytest.mark.slow
def test_scores_that_were_not_trained_are_left_out(unfinished, ask, samples):
    given = samples[0]["source"].encode()
    code, out, err = ask("translate", stdin=given, folder=unfinished)
    assert (code, out.strip(), err) == (0, samples[0]["translation"], "")
    code, out, err = ask("evaluate", folder=unfinished)
    assert (code, err) == (0, "translate: additive has no checkpoint and is left out.\n")
    found = json.loads((unfinished / "evaluations" / "test.json").read_text("utf-8"))
    assert [row["score"] for row in found["scores"]] == ["dot"]
    assert ask("evaluate", "--scores=additive", folder=unfinished)[2].endswith(
        "checkpoints/additive holds no checkpoint; train the run first.\n"
    )


@pytest.mark.slow
def test_nothing_in_nothing_out(ask):
    assert ask("translate") == ask("score") == (0, "", "")

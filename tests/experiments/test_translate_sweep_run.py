"""A sweep as one job: what is done is not done again, and what diverged does not stop the rest."""

import csv
import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.leases import Leases, State
from experiments.translate.marks import write_marked
from experiments.translate.stopping import Diverged, Interrupted
from experiments.translate_sweep import run
from experiments.translate_sweep.__main__ import main
from tests.experiments.kills import killed, wait_for

ROOT = Path(__file__).parents[2]
TINY = (
    "--data=copy",
    "--train_size=100",
    "--valid_size=10",
    "--test_size=10",
    "--width=4",
    "--steps=10",
    "--batch_size=8",
    "--buckets=1",
    "--scores=additive,dot",
)


@pytest.fixture
def sweep(tmp_path):
    """The program in a folder, with the promotion of arrays that a user's process has."""

    def do(*flags):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return main([*TINY, *flags, f"--workdir={tmp_path}/sweep"])

    return do


@pytest.fixture
def trained(monkeypatch):
    """Runs that train nothing: what they were asked for; rates above one diverge."""
    asked = []

    def train_and_measure(score, run):
        config, sizes, folder = run.config, run.sizes[score], run.folder
        asked.append((score, sizes.attention_size, config.learning_rate))
        if config.learning_rate > 1:
            raise Diverged(f"{score}, seed 0: the loss of step 1 is nan; no step is kept.")
        bleu = [90.0 + seed if score == "dot" else 10.0 for seed in range(config.seeds)]
        ones = [config.learning_rate] * config.seeds
        test = dict.fromkeys(("exact_match", "token_accuracy", "chrf", "loss"), ones)
        classes = dict.fromkeys(("alignment_error", "sure_found", "possible_found", "links_wrong"))
        (folder / "outcomes").mkdir()
        write_marked(
            folder / "outcomes" / f"{score}.json",
            folder,
            {
                "score": score,
                "parameters": 100,
                "sizes": sizes._asdict(),
                "compile_seconds": 1.0,
                "train_seconds": 2.0,
                "tokens_per_second": 3.0,
                "sets": {"valid": {"loss": ones}, "test": test | classes | {"bleu": bleu}},
                "steps_to_90": [None] * config.seeds,
                "mean_exact_match": ones,
            },
        )

    monkeypatch.setattr(run, "train_and_measure", train_and_measure)
    return asked


@pytest.mark.slow
@pytest.mark.exhaustive
def test_values_added_later_are_trained_alone(sweep, trained, tmp_path, capsys):
    assert sweep("--attention_size=2,4", "--learning_rate=0.01,100", "--seeds=7") == 0
    assert len(trained) == 8
    printed = capsys.readouterr().out
    assert "8/8 dot, attention_size=4, learning_rate=100.0: diverged (dot, seed 0" in printed
    assert printed.rstrip().endswith(f"{tmp_path}/sweep/results.json")
    results = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert [m["learning_rate"] for m in results["mechanisms"]] == 4 * [0.01]
    assert [c["conclusive"] for c in results["comparisons"]] == [True, True]
    assert len((tmp_path / "sweep" / "sweep.csv").read_text("utf-8").splitlines()) == 1 + 8 * 7
    for name in ("attention_size", "learning_rate"):
        assert (tmp_path / "sweep" / "figures" / f"{name}.png").stat().st_size > 1000

    trained.clear()
    assert sweep("--attention_size=2,4", "--learning_rate=0.01,100", "--seeds=7") == 0
    assert trained == []
    again = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert again == results
    assert sweep("--attention_size=2,4,8", "--learning_rate=0.001,0.01,100", "--seeds=7") == 0
    new = {(2, 0.001), (4, 0.001), (8, 0.001), (8, 0.01), (8, 100)}
    assert set(trained) == {(score, *where) for score in ("additive", "dot") for where in new}


@pytest.mark.slow
def test_the_tidy_table_keeps_the_runs_of_other_commands(sweep, trained, tmp_path):
    def rows():
        text = (tmp_path / "sweep" / "sweep.csv").read_text("utf-8")
        return list(csv.DictReader(text.splitlines()))

    flags = ("--seeds=2", "--scores=dot")
    assert sweep(*flags, "--dropout=0,0.1") == 0
    before = rows()
    assert [(row["dropout"], row["seed"], row["chosen"]) for row in before] == [
        ("0.0", "0", "true"),
        ("0.0", "1", "true"),
        ("0.1", "0", "true"),
        ("0.1", "1", "true"),
    ]
    assert sweep(*flags, "--dropout=0.1", "--train_size=90") == 0
    assert sweep(*flags, "--dropout=0.1") == 0
    found = rows()
    assert len(trained) == 3 and len(found) == 6
    of_runs = [(row["dropout"], row["train_size"], row["chosen"]) for row in found[::2]]
    assert of_runs[0] == ("0.1", "100", "true")
    assert set(of_runs[1:]) == {("0.1", "90", "false"), ("0.0", "100", "false")}
    table = tmp_path / "sweep" / "sweep.csv"
    table.write_text(table.read_text("utf-8").replace("90.0", "99.0"), "utf-8")
    assert sweep(*flags, "--dropout=0.1") == 0
    assert rows() == found, "what somebody wrote into the table is not read"
    assert [row["bleu"] for row in found] == ["90.0", "91.0"] * 3
    shutil.rmtree(tmp_path / "sweep" / "runs" / Path(found[2]["folder"]).name)
    assert sweep(*flags, "--dropout=0,0.1") == 0
    assert rows() == before, "what was deleted is not kept"


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_where_it_was(sweep, trained, capsys, monkeypatch):
    unstopped = run.train_and_measure

    def stopped(score, *rest):
        if score == "dot":
            raise Interrupted("step 5 of dot", 15)
        return unstopped(score, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_and_measure", stopped)
        assert sweep("--seeds=1") == 143
    assert capsys.readouterr().err == (
        "translate_sweep: interrupted after step 5 of dot; the same command goes on from there.\n"
    )
    assert [score for score, *_ in trained] == ["additive"]
    assert sweep("--seeds=1") == 0
    assert [score for score, *_ in trained] == ["additive", "dot"]


@pytest.mark.slow
def test_another_sweep_or_process_in_the_folder_is_refused(sweep, trained, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert sweep("--seeds=1") == 0
    capsys.readouterr()
    assert sweep("--seeds=2") == 2
    assert capsys.readouterr().err == (
        f"translate_sweep: --workdir {folder} holds another run (--seeds was 1, now it is 2); give "
        "another --workdir.\n"
    )
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sweep("--seeds=1") == 2
    assert capsys.readouterr().err == (
        f"translate_sweep: --workdir {folder} is in use by another process; wait for it, or give "
        "another.\n"
    )
    assert len(trained) == 2


def test_data_that_cannot_be_read_are_refused_before_anything_is_written(sweep, tmp_path, capsys):
    assert sweep("--data=/no/where.tsv") == 2
    assert capsys.readouterr().err.startswith("translate_sweep: /no/where.tsv does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        (
            "--batch_size=8,101",
            "batch_size is 101, but there are only 100 pairs to train on; set a smaller "
            "batch_size.\n",
        ),
        ("--train_size=50,7", "batch_size is 8, but there are only 7 pairs to train on; "),
        ("--scores=dot,nowhere.score", "--scores: nowhere.score cannot be imported: "),
        ("--scores=dot,location", "--scores=location does not fit this run: location: weight "),
    ],
)
def test_every_run_is_checked_before_the_first_is_done(
    flag, sentence, sweep, trained, tmp_path, capsys
):
    assert sweep(flag, "--learning_rate=0.01,0.02") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"translate_sweep: {sentence}") and error.count("\n") == 1
    assert trained == [] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_folder_of_a_run_that_holds_something_else_is_refused_at_once(
    sweep, trained, tmp_path, capsys
):
    assert sweep("--seeds=1", "--scores=dot") == 0
    (held,) = (tmp_path / "sweep" / "runs").iterdir()
    (held / "config.json").unlink()
    capsys.readouterr()
    assert sweep("--seeds=1", "--scores=additive,dot") == 2
    assert capsys.readouterr().err == (
        f"translate_sweep: --workdir {held} holds other files and no run; give another --workdir.\n"
    )
    assert len(trained) == 1


def test_a_sweep_goes_on_with_the_data_it_began_with_alone(sweep, trained, tmp_path, capsys):
    table = tmp_path / "table.tsv"
    table.write_text("".join(f"a{n} b\tc{n} d\n" for n in range(200)))
    flags = (f"--data={table}", "--seeds=1", "--min_count=1")
    assert sweep(*flags, "--scores=dot") == 0
    table.write_text("".join(f"a{n} b\tc{n} e\n" for n in range(200)))
    run._loaded.cache_clear()  # as a new process begins
    capsys.readouterr()
    assert sweep(*flags, "--scores=dot,additive") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"translate_sweep: {table} has changed since the run in ")
    assert error.count("\n") == 1 and len(trained) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["0.01", "100"])
def test_a_damaged_outcome_is_named(rate, sweep, trained, tmp_path, capsys):
    flags = ("--seeds=1", "--scores=dot", f"--learning_rate={rate}")
    assert sweep(*flags) == 0
    (run_of_it,) = (tmp_path / "sweep" / "runs").iterdir()
    name = "outcomes/dot.json" if rate == "0.01" else "diverged.json"
    (run_of_it / name).write_text("{")
    capsys.readouterr()
    assert sweep(*flags) == 2
    assert capsys.readouterr().err == (
        f"translate_sweep: {run_of_it / name} is damaged; delete it, and the same command measures "
        "again what was trained.\n"
    )
    assert len(trained) == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_real_sweep_measures_what_the_translator_measures(sweep, translate, tmp_path, capsys):
    """One rate is so large that weights overflow."""
    flags = ("--attention_size=4", "--seeds=2")
    assert sweep(*flags, "--learning_rate=0.01,1e30") == 0
    results = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert [m["learning_rate"] for m in results["mechanisms"]] == 2 * [0.01]
    assert all(m["rates"][1]["valid_loss"] is None for m in results["mechanisms"])
    assert "at least 6 seeds are needed" in results["conclusion"]
    alone = tmp_path / "alone"
    assert translate(*TINY, *flags, f"--workdir={alone}") == 0
    capsys.readouterr()
    theirs = json.loads((alone / "results.json").read_text(encoding="utf-8"))["mechanisms"]
    ours = results["mechanisms"]
    for name in ("valid_loss", "bleu", "alignment_error", "mean_exact_match"):
        assert [m["metrics"][name] for m in ours] == [m["metrics"][name] for m in theirs]
    assert all(Path(m["folder"]).is_relative_to(tmp_path) for m in ours)


def _comparable(folder):
    """The results of a sweep without what differs between two equal ones."""
    text = (folder / "results.json").read_text(encoding="utf-8").replace(str(folder), "")
    found = json.loads(text)
    del found["environment"]
    for mechanism in found["mechanisms"]:
        for name in ("compile_seconds", "train_seconds", "tokens_per_second"):
            del mechanism[name]
    return found


@pytest.mark.slow
def test_shards_do_the_runs_and_the_command_without_a_shard_collects_them(
    sweep, trained, tmp_path, capsys
):
    flags = ("--seeds=1", "--learning_rate=0.01,100")
    assert sweep(*flags, "--shard=2/2") == 0
    assert [(score, rate) for score, _, rate in trained] == [
        ("additive", 100),
        ("dot", 100),
        ("dot", 0.01),
        ("additive", 0.01),
    ]
    assert capsys.readouterr().out.endswith(
        "\nshard 2/2 is done, and so are all 4 runs; the same command without --shard writes the "
        "results\n"
    )
    assert not (tmp_path / "sweep" / "results.json").exists()
    assert sweep(*flags, "--shard=1/3") == sweep(*flags) == 0
    assert len(trained) == 4
    found = _comparable(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep")
    assert sweep(*flags) == 0
    assert _comparable(tmp_path / "sweep") == found


@pytest.mark.slow
def test_what_another_process_trains_is_left_to_it(sweep, trained, tmp_path, capsys):
    flags = ("--seeds=1",)
    assert sweep(*flags, "--scores=dot", "--shard=1/1") == 0
    (name,) = (path.name for path in (tmp_path / "sweep" / "runs").iterdir())
    shutil.rmtree(tmp_path / "sweep" / "runs" / name)
    trained.clear()
    with Leases(tmp_path / "sweep" / "leases").take(name):
        assert sweep(*flags, "--shard=2/2") == 0
    assert [score for score, *_ in trained] == ["additive"]
    assert capsys.readouterr().out.endswith(
        "\nshard 2/2 is done; of 2 runs 1 are still at work in other processes\n"
    )


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_killed_shard_is_taken_over_and_the_results_are_those_without_shards(
    sweep, tmp_path, capsys
):
    few = ("--scores=dot", "--seeds=1", "--learning_rate=0.01,0.02")
    flags = (*few, "--steps=100", "--checkpoint_seconds=0")
    folder = tmp_path / "sweep"

    def started(shard):
        command = [sys.executable, "-m", "experiments.translate_sweep", *TINY, *flags]
        command += [f"--workdir={folder}", f"--shard={shard}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    second = started("2/2")
    wait_for(lambda: any(folder.glob("runs/*/checkpoints/*/*.seal")), second, 600)
    first = started("1/2")
    assert killed(second), "it was to be killed at work"
    printed, _ = first.communicate()
    assert first.returncode == 0
    assert "so are all 2 runs" in printed and not (folder / "results.json").exists()
    standings = [Leases(folder / "leases").standing(p.name) for p in (folder / "runs").iterdir()]
    assert [found.state for found in standings] == [State.DONE] * 2
    assert {found.holder.process for found in standings} == {first.pid}
    assert sorted(found.generation for found in standings) == [1, 2]
    assert sweep(*flags) == 0
    assert ": training\n" not in capsys.readouterr().out
    found = _comparable(folder)
    shutil.rmtree(folder)
    assert sweep(*flags) == 0
    assert _comparable(folder) == found

"""The program that tests claims, run on two made-up claims."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.claims import run, workdir
from experiments.claims.__main__ import main
from experiments.claims.claim import SETTINGS, all_claims, all_themes, read_claim
from experiments.claims.command_line import Options, parse

ROOT = Path(__file__).parents[2]
GOOD = '''"""Numbers are larger than zero.

Source: Folklore.

Method: A number is
drawn.

Criterion: Holds if it is above zero.

Published: 1.5 in <another> place.
"""

from experiments.claims.claim import holds, fails
from experiments.claims.drawing import lines


def measure(setting, rng):
    with open({log!r}, "a") as log:
        log.write("measured ")
    return {{"number": setting.pick(tiny=2.0, quick=3.0, full=4.0), "tuple": (1, 2)}}


def verdict(data):
    assert data["tuple"] == [1, 2], "as JSON has it"
    return holds(f"It is {{data['number']}}.") if data["number"] > 0 else fails("It is not.")


def figure(data):
    return lines([1, 2], {{"number": [data["number"], [1.0, 2.0, 3.0]]}}, xlabel="x", ylabel="y")


def table(data):
    return [["what", "how much"], ["a <number>", "2"]]
'''
BAD = '''"""Nothing goes wrong.

Source: Nobody.

Method: It is tried.

Criterion: Holds if nothing is raised.
"""


def measure(setting, rng):
    raise FloatingPointError("something went\\nwrong")
'''


@pytest.fixture
def two_claims(tmp_path, monkeypatch):
    """Two claims in the theme "scale", of which the second raises; returns the log of the first."""
    package = tmp_path / "made_up"
    (package / "scale").mkdir(parents=True)
    log = tmp_path / "log"
    (package / "scale" / "c901_above_zero.py").write_text(GOOD.format(log=str(log)))
    (package / "scale" / "c902_nothing_wrong.py").write_text(BAD)
    found = {c.number: c for c in map(read_claim, sorted((package / "scale").glob("c*.py")))}
    for module in ("command_line", "report"):
        monkeypatch.setattr(f"experiments.claims.{module}.all_claims", lambda: found)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("experiments.claims.claim.__package__", "made_up")
    yield log
    for name in [name for name in sys.modules if name.startswith("made_up")]:
        del sys.modules[name]


@pytest.mark.slow
def test_a_failing_claim_is_reported_and_the_others_are_tested(two_claims, tmp_path, capsys):
    folder = tmp_path / "new" / "work"
    assert main(["--setting=tiny", f"--workdir={folder}", f"--out={tmp_path}/out/table.md"]) == 1
    printed = capsys.readouterr().out
    assert "901  holds" in printed and "902  failed" in printed
    assert printed.strip().endswith("report.html")
    good, bad = json.loads((folder / "results.json").read_text())["claims"]
    assert good["outcome"] == "holds" and good["because"] == "It is 2.0."
    assert good["method"] == "A number is drawn." and not good["cached"]
    assert (
        bad["outcome"] == "failed" and "FloatingPointError: something went wrong" in bad["because"]
    )
    assert "Traceback" in (folder / "errors" / "902.txt").read_text()
    for ending in ("png", "svg"):
        assert (folder / "figures" / f"c901_above_zero.{ending}").stat().st_size > 1000
    data = json.loads((tmp_path / "out" / "table.json").read_text())
    assert data == json.loads((folder / "results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 901 | Numbers are larger than zero. | **holds** | It is 2.0. |" in table


@pytest.mark.slow
def test_shards_measure_and_the_command_without_a_shard_reports(two_claims, tmp_path, capsys):
    arguments = ["--setting=tiny", f"--workdir={tmp_path / 'work'}"]
    assert main([*arguments, "--claims=901", "--shard=1/2"]) == 0
    assert capsys.readouterr().out.endswith(
        "shard 1/2 is done, and all 1 claims are measured; the same command without --shard writes "
        "the results\n"
    )
    assert main([*arguments, "--shard=2/2"]) == 1, "one fails"
    assert capsys.readouterr().out.endswith(
        "shard 2/2 is done; of 2 claims 1 failed or are still at work in other processes\n"
    )
    assert main([*arguments, "--shard=1/2"]) == 0, "that is not in this share"
    assert not (tmp_path / "work" / "results.json").exists()
    assert main(arguments) == 1
    assert two_claims.read_text().split() == ["measured"]
    good, bad = json.loads((tmp_path / "work" / "results.json").read_text())["claims"]
    assert good["cached"] and good["because"] == "It is 2.0." and bad["outcome"] == "failed"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_two_shards_at_once_measure_every_claim_once(tmp_path):
    arguments = ["--setting=tiny", "--claims=43,44"]

    def started(*flags):
        command = [sys.executable, "-m", "experiments.claims", *arguments, *flags]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    both = [started(f"--workdir={tmp_path}/shards", f"--shard={n}/2") for n in (1, 2)]
    printed = "".join(process.communicate()[0] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    tested = [line.split()[0] for line in printed.splitlines() if line[:2].isdecimal()]
    assert sorted(tested) == ["43", "44"]
    data = []
    for name in ("shards", "alone"):
        assert main([*arguments, f"--workdir={tmp_path}/{name}"]) == 0
        claims = json.loads((tmp_path / name / "results.json").read_text())["claims"]
        assert all(claim["cached"] == (name == "shards") for claim in claims)
        data.append([(claim["number"], claim["verdict"], claim["data"]) for claim in claims])
    assert data[0] == data[1]


@pytest.mark.slow
def test_the_report_has_everything_in_one_file(two_claims, tmp_path):
    main(["--setting=tiny", f"--workdir={tmp_path / 'work'}"])
    page = (tmp_path / "work" / "report.html").read_text()
    assert "Numbers are larger than zero." in page and "1.5 in &lt;another&gt; place." in page
    assert "a &lt;number&gt;" in page and "<h2>Scale</h2>" in page
    assert "data:image/svg+xml;base64," in page and "$" not in page.replace("$$", "")
    assert "http" not in page.split("<style>")[0] and "<script" not in page


@pytest.mark.slow
def test_whoever_reads_the_report_while_it_is_written_anew_sees_the_old_one(two_claims, tmp_path):
    path = tmp_path / "work" / "report.html"
    main(["--claims=901", "--setting=tiny", f"--workdir={path.parent}"])
    with path.open() as reader:
        main(["--setting=tiny", f"--workdir={path.parent}"])
        assert "Nothing goes wrong." not in reader.read()
    assert "Nothing goes wrong." in path.read_text()


@pytest.mark.slow
def test_what_was_measured_is_measured_again_only_if_its_code_changed(two_claims, tmp_path):
    arguments = ["--claims=901", "--setting=tiny", f"--workdir={tmp_path / 'work'}"]
    path = tmp_path / "made_up" / "scale" / "c901_above_zero.py"

    def measured() -> int:
        workdir._tree.cache_clear(), workdir._content.cache_clear()
        assert main(arguments) == 0
        return len(two_claims.read_text().split())

    assert measured() == 1
    assert measured() == 1, "found again"
    text = path.read_text()
    path.write_text(text.replace('"It is not."', '"No."').replace("Folklore", "Hearsay") + "# x\n")
    assert measured() == 1, "verdict, docstring and comments look at the same data"
    path.write_text(text.replace("tiny=2.0", "tiny=5.0"))
    assert measured() == 2, "measure has changed"
    arguments[1] = "--setting=quick"
    assert measured() == 3, "another setting"
    held = next((tmp_path / "work" / "cache").glob("901-quick-*.json"))
    held.write_text("{")
    assert measured() == 4, "a damaged file is no measurement"
    held = next((tmp_path / "work" / "cache").glob("901-quick-*.json"))
    held.write_text(held.read_text().replace("3.0", "9.0"))
    assert measured() == 5, "nor is one with a number that somebody changed"
    assert measured() == 5, "found again"


def test_the_key_of_a_claim_follows_what_it_imports():
    claim = all_claims()[44]
    root = Path(__file__).parents[2]
    names = {path.relative_to(root).as_posix() for path in workdir.imported_files(claim.path)}
    assert {"attention_jax/scores/formulas.py", "attention_jax/__init__.py"} <= names
    assert "experiments/claims/drawing.py" in names
    assert not any(name.startswith("experiments/benchmark/") for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--claims=44,38"], "--claims: there is no claim 38; --list shows all."),
        (["--claims=x"], "--claims: must be numbers such as 39,43, got 'x'."),
        (["--setting=slow"], "--setting: must be one of tiny, quick, full, got 'slow'."),
        (["--claim=3"], "unknown flag --claim; did you mean --claims?"),
        (["all"], "'all' is no flag; write --name=value, and --help lists all flags."),
        (["--out=/"], "--out: / is a folder; give a file."),
        (
            ["--shard=9/8"],
            "--shard is 9/8, but I/N with I from 1 to N is needed, as in 2/8.",
        ),
        (
            ["--shard=1/8", "--out=table.md"],
            "--shard=1/8 writes no table; leave --out out, and give it to the command without "
            "--shard.",
        ),
        (["--out=results"], "--out is results, but a name that ends in .md is needed."),
        (
            ["--out=/dev/null/table.md"],
            "--out: /dev/null/table.md cannot be written in /dev/null: Not a directory; give "
            "another.",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"claims: {message}\n" and not captured.out


def test_data_beside_the_table_replace_nothing_else(two_claims, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--claims=901", "--setting=tiny", "--workdir=work", "--out=package.md"]
    Path("package.json").write_text('{"name": "mine"}')
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "claims: --out: the data go into package.json, but that file is not of this program; give "
        "another name.\n"
    )
    assert not Path("work").exists() and Path("package.json").read_text() == '{"name": "mine"}'
    Path("package.json").unlink()
    Path("package.json").mkdir()
    assert main(arguments) == 2
    assert capsys.readouterr().err == "claims: --out: package.json is a folder; give a file.\n"
    Path("package.json").rmdir()
    assert main(arguments) == main(arguments) == 0, "written anew"


def test_a_table_keeps_the_claims_that_are_not_tested_now(two_claims, tmp_path):
    arguments = [f"--workdir={tmp_path}/work", f"--out={tmp_path}/table.md"]
    assert main([*arguments, "--setting=tiny"]) == 1
    assert main([*arguments, "--claims=901", "--setting=quick"]) == 0
    good, bad = json.loads((tmp_path / "table.json").read_text())["claims"]
    assert good["because"] == "It is 3.0." and good["made"]["setting"] == "quick"
    assert bad["outcome"] == "failed" and bad["made"]["setting"] == "tiny"
    table = (tmp_path / "table.md").read_text()
    assert "`python -m experiments.claims --setting=tiny`" in table.splitlines()[2]
    assert "Some of them by `python -m experiments.claims --claims=901 --setting=quick`" in table
    assert "| 901 |" in table and "| 902 |" in table
    assert main([*arguments, "--setting=tiny"]) == 1
    assert "made" not in (tmp_path / "table.json").read_text().lower().replace("made_up", "")


@pytest.mark.parametrize(("chosen", "flag"), [([], ""), (["--claims=901"], " --claims=901")])
def test_the_command_that_is_reported_tests_the_same_claims(chosen, flag, two_claims, tmp_path):
    main([*chosen, "--setting=tiny", f"--workdir={tmp_path}/work", f"--out={tmp_path}/table.md"])
    command = f"python -m experiments.claims{flag} --setting=tiny"
    assert f"<pre>{command}</pre>" in (tmp_path / "work" / "report.html").read_text()
    assert f"Made by `{command}`, jax " in (tmp_path / "table.md").read_text()


def test_an_unwritable_workdir_gets_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--claims=53", f"--workdir={tmp_path / 'file' / 'work'}"]) == 2
    message = f"claims: --workdir {tmp_path / 'file' / 'work'}: Not a directory; give another"
    assert capsys.readouterr().err == f"{message} --workdir.\n"
    assert main(["--claims=53", f"--workdir={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err.endswith("File exists; give another --workdir.\n")


def _contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.is_file() and path.read_bytes()
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("files", "why"),
    [
        (
            {"results.json": '{"config": {}}', "config.json": "{}", "cache/901.json": "{}"},
            ": {folder}/results.json is not of this program",
        ),
        ({"results.json": "no JSON"}, ": {folder}/results.json is not of this program"),
        (
            {"report.html": "another", "cache/901-slow-0.json": "{}"},
            " holds other files, such as report.html, and no tests of claims",
        ),
        (
            {"cache/0.json": "", "config.json": "{}", "thesis.txt": ""},
            " holds other files, such as config.json, and no tests of claims",
        ),
    ],
)
def test_the_folder_of_another_program_is_left_as_it_is(files, why, tmp_path, capsys):
    folder = tmp_path / "work"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = _contents(folder)
    assert main(["--claims=53", "--setting=tiny", f"--workdir={folder}"]) == 2
    captured = capsys.readouterr()
    sentence = why.format(folder=folder)
    assert captured.err == f"claims: --workdir {folder}{sentence}; give another --workdir.\n"
    assert not captured.out and _contents(folder) == before


@pytest.mark.slow
def test_a_folder_of_ours_is_gone_on_with_whenever_it_was_left(two_claims, tmp_path):
    folder = tmp_path / "work"
    arguments = ["--claims=901", "--setting=tiny", f"--workdir={folder}"]
    folder.mkdir()
    assert main(arguments) == 0, "empty"
    (folder / "notes.txt").write_text("those of the user")
    assert main(arguments) == 0, "done before"
    (folder / "results.json").unlink()
    assert main(arguments) == 0, "stopped after a measurement"
    assert two_claims.read_text().split() == ["measured"]
    for name in ("cache", "figures", "results.json", "report.html", "notes.txt"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "errors").mkdir()
    assert main(arguments) == 0, "stopped before the first measurement was over"


@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_help_and_list_answer_without_waiting_for_jax(flag):
    command = (
        "import sys; from experiments.claims.__main__ import main; code = main([sys.argv[1]]); "
        "assert not {'jax', 'matplotlib'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", command, flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--workdir" in done.stdout if flag == "--help" else "  44  " in done.stdout


def test_every_claim_of_the_checklist_is_there_and_says_what_it_needs_to():
    found = all_claims()
    assert set(found) == set(range(39, 80))
    assert {claim.theme for claim in found.values()} == set(all_themes())
    for claim in found.values():
        lines = claim.path.read_text(encoding="utf-8").count("\n")
        assert claim.claim.endswith(".") and 30 <= lines <= 130, (claim.path, lines)


def test_a_file_that_lacks_a_criterion_is_refused(tmp_path):
    path = tmp_path / "c1_x.py"
    path.write_text('"""It is so.\n\nSource: x.\n\nMethod: y.\n"""\n')
    with pytest.raises(ValueError, match="the claim lacks criterion"):
        read_claim(path)


def test_a_file_with_a_mistake_fails_alone(tmp_path):
    path = tmp_path / "scale" / "c1_x.py"
    path.parent.mkdir()
    path.write_text('"""It is so.\n\nSource: x.\n\nMethod: y.\n\nCriterion: z.\n"""\nimport (\n')
    record = run.test(read_claim(path), SETTINGS["tiny"], tmp_path)
    assert record["outcome"] == "failed" and record["because"]


def test_options_choose_claims_in_the_order_of_themes():
    options = parse(["--claims=53,39"])
    assert isinstance(options, Options) and [c.number for c in options.chosen] == [39, 53]
    assert len(Options().chosen) == len(all_claims())

"""Arguments of all programs: each gives a value, or one sentence that refuses it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from experiments.command_line import UsageError, check_file, check_folder, parse_flags, run

ROOT = Path(__file__).parents[2]


def values():
    found = flags.FlagValues()
    flags.DEFINE_bool("lowercase", True, "", flag_values=found)
    flags.DEFINE_integer("seeds", 3, "", flag_values=found)
    flags.DEFINE_string("flagfile", "", "", flag_values=found)
    return found


def in_process(call, **files):
    """Run a call in a process of its own, whose output goes to files."""
    code = (
        "import sys; from absl.flags import FlagValues\n"
        "from experiments.command_line import complain, parse_flags, run, show, terminal\n"
        f"sys.exit({call})"
    )
    with contextlib.ExitStack() as stack:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        opened = {name: stack.enter_context(open(path, "w")) for name, path in files.items()}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=ROOT, text=True, **(pipes | opened))


def refusal(*arguments):
    with pytest.raises(UsageError) as error:
        parse_flags("program", values(), arguments, str)
    return str(error.value)


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--nolowercase=1", "--nolowercase=1 does not take an argument; --help lists all flags."),
        (
            "--lowercase=maybe",
            "--lowercase is maybe, but true or false is needed; --help lists all flags.",
        ),
        (
            "--seeds=x",
            "--seeds: 'x' is no whole number; --help lists all flags.",
        ),
    ],
)
def test_a_value_of_another_type_gets_one_sentence(argument, sentence):
    assert refusal(argument) == sentence


def test_long_words_are_not_repeated_whole(capsys):
    long = 20_000 * "x"
    assert refusal(f"--{long}") == (
        f"unknown flag --{38 * 'x'}... (20,002 characters); --help lists all flags."
    )

    def refuse(options):
        raise UsageError(f"{long} is no file.")

    def opened(options):
        os.stat(long)

    assert run("program", [], list, refuse) == 2
    assert run("program", [], list, opened) == 1
    assert capsys.readouterr().err == (
        f"program: {40 * 'x'}... (20,000 characters) is no file.\n"
        f"program: {40 * 'x'}... (20,000 characters): File name too long; put that right, "
        "and try again.\n"
    )


def test_a_file_of_flags_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "some.flags"
    file.write_bytes(b"--seeds=2\n\xff\n")
    assert refusal(f"--flagfile={file}") == (
        "--flagfile: text in utf-8 is needed, but the file has the byte 0xff where no character "
        "can have it; give another file."
    )


@pytest.mark.parametrize("text", ["--seeds=2\n", "# a comment\n--seeds=2\n", "seeds\n", ""])
def test_a_file_of_flags_with_a_byte_order_mark_is_refused(text, tmp_path):
    file = tmp_path / "some.flags"
    file.write_text(text, "utf-8-sig")
    assert refusal(f"--flagfile={file}") == (
        "--flagfile: the file begins with a byte order mark, which is no flag; save it as UTF-8 "
        "without one."
    )


def test_a_file_of_flags_that_includes_itself_is_refused(tmp_path, capsys):
    first, second = tmp_path / "first.flags", tmp_path / "second.flags"
    first.write_text(f"--flagfile={second}\n")
    second.write_text(f"--seeds=2\n--flagfile={first}\n")
    sentence = f"--flagfile: {first} includes itself; take --flagfile out of it."
    assert refusal(f"--flagfile={first}") == sentence
    assert capsys.readouterr().err == ""


def test_a_file_of_flags_may_be_included_twice(tmp_path):
    file = tmp_path / "some.flags"
    file.write_text("--seeds=2\n")
    given = parse_flags("program", values(), [f"--flagfile={file}", f"--flagfile={file}"], str)
    assert given["seeds"] == 2 and given["lowercase"] is True


@pytest.mark.parametrize("check", [check_file, check_folder])
def test_what_cannot_be_written_is_known_before_the_work(check, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    check("out", there / "new" / "x")
    assert not list(there.iterdir())
    (there / "results.md").touch()
    check_file("out", there / "results.md")  # it is replaced
    for path, parent, why in (
        (Path("/proc/new/x"), "/proc", "No such file or directory"),
        (Path("/dev/null/x"), "/dev/null", "Not a directory"),
        (there / ("a" * 250), there, "File name too long"),  # that of the unfinished file
        (there / "new" / ("a" * 300) / "x", there, "File name too long"),
    ):
        with pytest.raises(UsageError) as error:
            check("out", path)
        assert str(error.value) == (
            f"--out: {path} cannot be written in {parent}: {why}; give another."
        )


def test_a_warning_is_one_line():
    code = (
        "import sys, warnings; from experiments.command_line import run\n"
        "sys.exit(run('program', [], list, lambda _: warnings.warn('First.\\nSecond.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "program: First. Second.\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
@pytest.mark.parametrize(
    "call",
    [
        "run('program', [], list, lambda _: terminal().print('a') or show('b'))",
        "run('program', ['--help'], lambda _: parse_flags('', FlagValues(), _, lambda: 'a'), id)",
    ],
)
def test_an_output_that_is_full_gets_one_sentence(call):
    done = in_process(call, stdout="/dev/full")
    assert (done.returncode, done.stderr) == (
        1,
        "program: No space left on device; put that right, and try again.\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
def test_a_refusal_that_nobody_can_read_has_its_exit_code():
    done = in_process("complain('program', 'No.', 2)", stderr="/dev/full")
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_figures_are_written_whatever_backend_the_environment_names(backend, tmp_path, monkeypatch):
    """A cell of a notebook names one that only its own Python has."""
    monkeypatch.setenv("MPLBACKEND", backend)
    code = (
        "import sys; from experiments.command_line import run\n"
        "def draw(path):\n"
        "    from matplotlib.figure import Figure\n"
        "    Figure().savefig(path)\n"
        "sys.exit(run('draw', None, lambda arguments: arguments[0], draw))"
    )
    path = tmp_path / "figure.png"
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0 and not done.stderr and path.stat().st_size > 1000


def test_the_environment_is_as_it_was_after_a_program(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "svg")
    found = []
    assert run("program", [], list, lambda _: found.append(os.environ.get("MPLBACKEND"))) == 0
    assert found == [None] and os.environ["MPLBACKEND"] == "svg"


def test_every_program_runs_by_the_function_that_all_share():
    """So that what is done there for one program is done for all."""
    programs = [
        path
        for path in (ROOT / "experiments").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    assert len(programs) >= 6
    for path in programs:
        text = path.read_text(encoding="utf-8")
        assert "command_line.run(" in text or "run_program(" in text or "return run(" in text, path


def test_a_file_that_the_system_refuses_gets_one_sentence(tmp_path, capsys):
    path = tmp_path / ("n" * 280)

    def write(_):
        path.write_text("")

    assert run("program", [], list, write) == 1
    said = capsys.readouterr().err
    assert said == f"program: {path}: File name too long; put that right, and try again.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "from experiments import gallery; sys.exit(gallery.main(['--only=full,causal']))",
        "from experiments import approximation as a; a.measure = lambda options: []; "
        "sys.exit(a.main([]))",
        "from experiments.claims import __main__, run; run.test = lambda claim, *_: {'number': 43, "
        "'theme': '', 'claim': '', 'outcome': 'holds', 'verdict': 'holds', 'because': ''}; "
        "sys.exit(__main__.main(['--claims=43', f'--workdir={sys.argv[1]}']))",
    ],
)
def test_a_reader_who_stops_early_is_no_mistake(code, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", f"import sys; {code}", str(tmp_path)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0 and not done.stderr

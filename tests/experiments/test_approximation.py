import subprocess
import sys

import pytest

from experiments import approximation

SMALL = ["--length=32", "--depth=8", "--features=16", "--ranks=8,32", "--scales=0.3", "--draws=300"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_error_stands_beside_its_theory_and_the_mean_of_the_values(tmp_path, capsys):
    out = tmp_path / "new" / "table.md"
    assert approximation.main([*SMALL, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() in out.read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines()[2:]]
    assert len(lines) == 3 * 2 + 2 + 2 * 2
    assert len({line[4] for line in lines}) == 1, "one baseline for all"
    found = {(line[1], line[2]): line for line in lines}
    for (name, size), line in found.items():
        better = float(line[3]) < float(line[4])
        assert line[5] == ("yes" if better else "no") or line[3] == line[4]
        if "independent" in name or "random" in name:
            assert float(line[6]) == pytest.approx(float(line[7]), rel=0.25), (name, size)
        if "orthogonal" in name:
            assert float(line[6]) < float(line[7])
    assert float(found["Linformer, mean pooling", "32"][3]) < 1e-6, "pooling one row each"
    assert found["linear, taylor", ""][5] == "yes"


def test_small_errors_have_digits():
    row = approximation.Row(0.001, "linear, taylor", None, 0.00123456, 1.23456e-07)
    line = approximation.table([row]).splitlines()[-1]
    assert line == "| 0.001 | linear, taylor |  | 1.23e-07 | 0.00123 | yes |  |  |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length=x"], "approximation: --length: must be a number, got x."),
        (["--features=8,"], "approximation: --features: must be numbers, got 8,."),
        (["--scales=0.5,-1"], "approximation: --scales: must be above 0, got 0.5,-1."),
        (["--draws=0"], "approximation: --draws: must be above 0, got 0."),
        (
            ["--draws=99999999999999999999"],
            "approximation: --draws: must be at most 1000000, got 99999999999999999999.",
        ),
        (
            ["--features=8,1000001"],
            "approximation: --features: must be at most 1000000, got 8,1000001.",
        ),
        (
            ["--ranks=16,256"],
            "approximation: --ranks: a rank is at most --length=128, got 256.",
        ),
        (
            ["--seed=99999999999999999999"],
            "approximation: --seed: must be at least -9223372036854775808 and below "
            "9223372036854775808, got 99999999999999999999.",
        ),
        (["--out=tests"], "approximation: --out: tests is a folder; give a file."),
        (
            ["--out=/dev/null/new/x.md"],
            "approximation: --out: /dev/null/new/x.md cannot be written in /dev/null: Not a "
            "directory; give another.",
        ),
        (
            ["all"],
            "approximation: 'all' is no flag; write --name=value, and --help lists all flags.",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    assert approximation.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message + "\n" and not captured.out


def test_help_answers_without_waiting_for_jax():
    command = (
        "import sys; from experiments import approximation; code = approximation.main(['--help']); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Approximates softmax attention")

import subprocess
import sys

import pytest

from experiments import gallery


@pytest.mark.slow
def test_every_mask_is_drawn_with_its_tiles(capsys):
    assert gallery.main(["--length=12", "--tile=3"]) == 0
    drawn = capsys.readouterr().out
    for name in gallery.parse([]).only:
        assert f"{name}: " in drawn
    causal = drawn.split("causal: ")[1].splitlines()
    assert causal[0] == "10 of 16 tiles of 3 x 3 are live"
    assert causal[1:5] == [
        "█···········   ▒···",
        "██··········   █▒··",
        "███·········   ██▒·",
        "████········   ███▒",
    ]


@pytest.mark.slow
def test_some_masks_saved_as_pictures(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert gallery.main(["--only=bigbird,swin", "--length=8", f"--out={out}"]) == 0
    assert (out / "gallery.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "gallery.svg").read_text()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        str(out / "gallery.png"),
        str(out / "gallery.svg"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only=bigbrid"], "gallery: --only: no mask 'bigbrid'; did you mean bigbird?"),
        (
            ["--length=15"],
            "gallery: --length must be 4 to 256 and a multiple of --tile, got --length=15 and "
            "--tile=4.",
        ),
        (
            ["--tile=0"],
            "gallery: --length must be 4 to 256 and a multiple of --tile, got --length=16 and "
            "--tile=0.",
        ),
        (
            ["causal"],
            "gallery: 'causal' is no flag; write --name=value, and --help lists all flags.",
        ),
        (["--out=setup.cfg"], "gallery: --out: setup.cfg is a file; give a directory."),
        (
            ["--out=/dev/null/new"],
            "gallery: --out: /dev/null/new cannot be written in /dev/null: Not a directory; give "
            "another.",
        ),
        (
            ["--only="],
            "gallery: --only is empty; name at least one mask, or leave it out for all.",
        ),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, capsys):
    assert gallery.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == message + "\n" and not captured.out


def test_an_unknown_flag_gets_one_line(capsys):
    assert gallery.main(["--lenght=3"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_answers_without_waiting_for_jax():
    command = (
        "import sys; from experiments import gallery; code = gallery.main(['--help']); "
        "assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Draws every mask")

"""WORKSPACE.md is a map: every path it names must be there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP_LEVEL = ("attention_jax/", "experiments/", "tests/", "constraints.txt", "noxfile.py", ".ci/")


def test_every_path_in_the_map_exists():
    named = set(re.findall(r"`([\w./-]+)`", (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")))
    paths = {name for name in named if name.startswith(TOP_LEVEL) and "NAME" not in name}
    assert len(paths) > 20
    assert [name for name in sorted(paths) if not (ROOT / name).exists()] == []


def test_every_library_file_is_on_the_map():
    text = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "attention_jax").glob("*.py")
        if path.name != "__init__.py"
    }
    assert [name for name in sorted(files) if name not in text] == []

"""WORKSPACE.md is one page, and what it says of the layers is what `test_imports` checks."""

import re
from pathlib import Path

from tests.test_imports import LAYERS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "WORKSPACE.md").read_text(encoding="utf-8")
TOP_LEVEL = ("attention_jax/", "experiments/", "tests/", ".ci/")


def section(title):
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_path_exists():
    named = set(re.findall(r"`([\w./-]+)`", TEXT))
    paths = {name for name in named if name.startswith(TOP_LEVEL) and "NAME" not in name}
    assert len(paths) > 20
    assert [name for name in sorted(paths) if not (ROOT / name).exists()] == []


def test_it_is_one_page():
    assert len(TEXT.split()) <= 1200


def test_every_layer_is_named_in_the_order_of_imports():
    named = re.findall(r"`attention_jax/(\w+)(?:\.py|/)`", section("Layers").split("|---|")[1])
    height = {name: height for height, layer in enumerate(LAYERS) for name in layer}
    assert sorted(named) == sorted(height)
    assert [height[name] for name in named] == sorted(height[name] for name in named)

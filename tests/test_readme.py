"""The README's Python runs as it stands, and its table of contents tells the truth."""

import re
from pathlib import Path

import jax.numpy as jnp

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_code_on_the_first_screen_runs():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert names["context"].shape == names["q"].shape
    assert bool(jnp.all(jnp.isfinite(names["context"])))
    assert names["y"].shape == (2, 128, 512)


def test_two_shell_commands_come_first():
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    assert "experiments.translate" in blocks[0]
    assert "pytest" in blocks[1]

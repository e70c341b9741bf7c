"""The README's Python runs as it stands, and its table of contents tells the truth."""

import re
from pathlib import Path

import jax.numpy as jnp

from experiments.claims.catalogue import claims

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_verdicts_are_those_of_the_committed_run():
    committed = (ROOT / "experiments" / "results" / "claims.md").read_text(encoding="utf-8")
    verdicts = {int(number): rest for number, *rest in _rows(committed)}
    assert verdicts.keys() == claims().keys()
    for number, claim in claims().items():
        assert verdicts[number][0] == claim.claim
    ours = {int(number): rest for number, *rest in _rows(README)}
    assert ours == {number: rest[:2] for number, rest in verdicts.items()}


def _rows(text):
    """Yield the cells of the rows of tables that begin with a number."""
    for line in text.splitlines():
        if re.match(r"\| \d+ \|", line):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]

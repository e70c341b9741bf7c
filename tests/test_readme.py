"""The README's Python runs as it stands, and its tables tell the truth."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments.claims.catalogue import claims
from experiments.statistics import compare_families
from experiments.translate_sweep.conclusion import conclude
from experiments.translate_sweep.results import compare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
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


def test_the_headline_is_that_of_the_committed_sweep():
    committed = ROOT / "experiments" / "results" / "attention_size.json"
    found = json.loads(committed.read_text(encoding="utf-8"))
    assert found["command"] in README
    rows = re.findall(r"^\| (\d+) features \| (.*) \|$", README, flags=re.MULTILINE)
    assert {int(size): cells.split(" | ") for size, cells in rows} == {
        size: [_bleu(found, score, size) for score in ("scaled_dot", "dot", "additive")]
        for size in found["axes"]["attention_size"]
    }
    points = [{"attention_size": size} for size in found["axes"]["attention_size"]]
    for again, before in zip(
        compare(found["mechanisms"], points), found["comparisons"], strict=True
    ):
        assert again["p_value"] == pytest.approx(before["p_value"])
        assert again["difference"] == pytest.approx(before["difference"])
    assert conclude(found) == found["conclusion"]


def test_what_is_said_of_narrow_and_wide_attention_is_what_was_found():
    committed = ROOT / "experiments" / "results" / "claims.json"
    records = json.loads(committed.read_text(encoding="utf-8"))["claims"]
    (data,) = (record["data"] for record in records if record["number"] == 51)
    of_sizes = {
        str(size): {score: of[number] for score, of in data["bleu"].items() if score != "dot"}
        for number, size in enumerate(data["sizes"])
    }
    found = [of_size for (of_size,) in compare_families(of_sizes).values()]
    ahead = {c.metric: f"{c.difference.mean:.1f}" for c in found if c.conclusive}
    assert ahead == {"2": "6.4", "8": "1.0", "128": "-0.5", "512": "-0.5"}
    assert [c.first for c in found] == ["scaled_dot"] * 5
    text = " ".join(README.split())
    assert (
        "the scaled dot product is ahead of additive attention by 6.4 BLEU at 2 features and by "
        "1.0 at 8, and behind by 0.5 at 128 and at 512"
    ) in text
    assert "the dot product collapses to 69 BLEU at 512 features" in text
    assert round(sum(data["bleu"]["dot"][-1]) / len(data["bleu"]["dot"][-1])) == 69


def _bleu(found, score, size):
    of_score = [m for m in found["mechanisms"] if m["score"] == score]
    (bleu,) = [m["metrics"]["bleu"] for m in of_score if m["point"]["attention_size"] == size]
    return "{mean:.1f} ({low:.1f}–{high:.1f})".format(**bleu)


def _rows(text):
    """Yield the cells of the rows of tables that begin with a number."""
    for line in text.splitlines():
        if re.match(r"\| \d+ \|", line):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]

"""Every README tells the truth: code runs, links resolve, commands exist, numbers are measured."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from experiments.claims.claim import all_claims
from experiments.significance import compare_families
from experiments.translate_sweep.conclusion import conclude
from experiments.translate_sweep.results import compare

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
PATHS = [
    ROOT / "README.md",
    ROOT / "WORKSPACE.md",
    *sorted(ROOT.glob("attention_jax/**/*.md")),
    *sorted(ROOT.glob("experiments/**/README.md")),
]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES["README.md"]
CLAIMS = PAGES["experiments/claims/README.md"]
SWEEP = PAGES["experiments/translate_sweep/README.md"]
COMMAND = re.compile(r"python -m (experiments\.\w+)((?:\\\n|[^`\n#|])*)")
COMMANDS = sorted(
    {match.group(1) for text in PAGES.values() for match in COMMAND.finditer(text)}
    - {"experiments.NAME"}
)
WITH_PYTHON = [  # examples with prompts are doctests
    name for name, text in PAGES.items() if "```python\n" in text and ">>> " not in text
]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def rows(text):
    """Return the cells of the rows of tables that begin with a number."""
    found = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in found]


def test_every_program_has_a_page():
    programs = {path.parent for path in ROOT.glob("experiments/*/__main__.py")}
    assert len(programs) >= 4
    assert programs <= {path.parent for path in PATHS if path.name == "README.md"}


def test_the_first_page_is_short():
    assert len(README.split()) <= 900


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_runs_as_it_stands(page):
    names: dict = {}
    for block in blocks(PAGES[page], "python"):
        exec(block, names)
    if page == "README.md":
        for name in ("gradient", "curvature"):
            assert names[name].shape == names["q"].shape
            assert bool(jnp.all(jnp.isfinite(names[name]))) and bool(jnp.any(names[name]))
        assert names["y"].shape == (2, 128, 512)
    elif page == "attention_jax/parallel/README.md":
        assert names["found"].shape == (2, 32, 100)
        assert bool(jnp.all(jnp.isfinite(names["found"])))
    else:
        assert [leaf.shape for leaf in names["gradient"].keywords.values()] == [(16, 16)]
        whole = names["attend"](*3 * [names["x"]])
        assert bool(jnp.allclose(names["joined"], whole, atol=1e-5))


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_imports_nothing_that_it_does_not_use(page):
    code = "".join(blocks(PAGES[page], "python"))
    imported = re.findall(r"^(?:from \S+ )?import (.+)$", code, flags=re.MULTILINE)
    names = {name.split(" as ")[-1].strip() for line in imported for name in line.split(",")}
    assert len(names) >= 4
    assert {name for name in names if len(re.findall(rf"\b{name}\b", code)) < 2} == set()


def test_two_shell_commands_come_first():
    training, tests, *_ = blocks(README, "sh")
    assert "experiments.translate" in training
    assert "pytest" in tests


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    files = [link for link in links if not link.startswith("https://")]
    assert [link for link in files if not (folder / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_and_folders_exist(page):
    named = re.findall(r"`((?:attention_jax|experiments|tests)/[\w./-]*)(?:::\w+)?`", PAGES[page])
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


@pytest.mark.parametrize("program", COMMANDS)
def test_commands_have_the_flags_they_are_shown_with(program):
    asked = subprocess.run(
        [sys.executable, "-m", program, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    known = set(re.findall(r"--(\w+)", asked.stdout)) | {"help"}
    shown = {
        flag
        for text in PAGES.values()
        for match in COMMAND.finditer(text)
        if match.group(1) == program
        for flag in re.findall(r"--(\w+)", match.group(2))
    }
    assert asked.returncode == 0
    assert shown <= known, shown - known


def test_what_is_asked_for_elsewhere_is_tested_here():
    table = README.split("| what | asked for in | tested by |\n|---|---|---|\n")[1].split("\n\n")[0]
    lines = table.splitlines()
    assert 10 <= len(lines) <= 15
    for line in lines:
        _, thread, test = (cell.strip() for cell in line.strip("|").split("|"))
        found = re.fullmatch(r"\[([\w./-]+)#(\d+)\]\((.+)\)", thread)
        assert found is not None, thread
        repository, number, address = found.groups()
        assert address == f"https://github.com/{repository}/issues/{number}"
        file, name = test.strip("`").split("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_the_verdicts_are_those_of_the_committed_run():
    committed = (RESULTS / "claims.md").read_text(encoding="utf-8")
    verdicts = {int(number): rest for number, *rest in rows(committed)}
    assert verdicts.keys() == all_claims().keys()
    for number, claim in all_claims().items():
        assert verdicts[number][0] == claim.claim
    ours = {int(number): rest for number, *rest in rows(CLAIMS)}
    assert ours == {number: rest[:2] for number, rest in verdicts.items()}
    stand = sum(rest[1] == "**holds**" for rest in verdicts.values())
    assert f"{len(verdicts) - stand} of {len(verdicts)} claims do not hold as" in _flat(CLAIMS)
    for page in ("README.md", "experiments/README.md"):
        assert f"{len(verdicts)} claims about attention" in PAGES[page]


def test_the_advice_rests_on_claims():
    chooser = CLAIMS.split("| if | then | because |\n|---|---|---|\n")[1].split("\n\n")[0]
    for line in chooser.splitlines():
        _, _, advice, because, _ = line.split("|")
        for module, name in re.findall(r"`(scores|masks|positions|nnx)\.(\w+)`", advice):
            assert hasattr(importlib.import_module(f"attention_jax.{module}"), name), name
        reasons = re.findall(r"\(([\d, ]+)\)", because)
        assert reasons, line
        assert {int(x) for reason in reasons for x in reason.split(", ")} <= all_claims().keys()


def test_the_headline_is_that_of_the_committed_sweep():
    found = json.loads((RESULTS / "attention_size.json").read_text(encoding="utf-8"))
    assert found["command"] in SWEEP
    cells = re.findall(r"^\| (\d+) features \| (.*) \|$", SWEEP, flags=re.MULTILINE)
    assert {int(size): row.split(" | ") for size, row in cells} == {
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


def test_the_first_page_says_what_the_committed_sweep_found():
    found = json.loads((RESULTS / "attention_size.json").read_text(encoding="utf-8"))
    differences = {
        comparison["point"]["attention_size"]: comparison
        for comparison in found["comparisons"]
        if {comparison["first"], comparison["second"]} == {"additive", "scaled_dot"}
    }
    ahead = {
        size: comparison["difference"]["mean"] * (1 if comparison["first"] == "scaled_dot" else -1)
        for size, comparison in differences.items()
    }
    assert f"{ahead[2]:.0f} BLEU at 2 features and {ahead[8]:.0f} at 8" in _flat(README)
    assert f"additive attention by {-ahead[512]:.1f} at 512" in _flat(README)
    assert {f"{differences[size]['p_value']:.2f}" for size in (2, 8, 512)} == {"0.03"}
    assert "p = 0.03 each after correction" in _flat(README)


def test_what_is_said_of_narrow_and_wide_attention_is_what_was_found():
    records = json.loads((RESULTS / "claims.json").read_text(encoding="utf-8"))["claims"]
    (data,) = (record["data"] for record in records if record["number"] == 51)
    of_sizes = {
        str(size): {score: of[number] for score, of in data["bleu"].items() if score != "dot"}
        for number, size in enumerate(data["sizes"])
    }
    found = [of_size for (of_size,) in compare_families(of_sizes).values()]
    ahead = {c.metric: f"{c.difference.mean:.1f}" for c in found if c.conclusive}
    assert ahead == {"2": "6.4", "8": "1.0", "128": "-0.5", "512": "-0.5"}
    assert [c.first for c in found] == ["scaled_dot"] * 5
    assert (
        "the scaled dot product is ahead of additive attention by 6.4 BLEU at 2 features and by "
        "1.0 at 8, and behind by 0.5 at 128 and at 512"
    ) in _flat(CLAIMS)
    assert "the dot product collapses to 69 BLEU at 512 features" in _flat(CLAIMS)
    assert round(sum(data["bleu"]["dot"][-1]) / len(data["bleu"]["dot"][-1])) == 69


def _flat(text):
    return " ".join(text.split())


def _bleu(found, score, size):
    of_score = [m for m in found["mechanisms"] if m["score"] == score]
    (bleu,) = [m["metrics"]["bleu"] for m in of_score if m["point"]["attention_size"] == size]
    return "{mean:.1f} ({low:.1f}–{high:.1f})".format(**bleu)

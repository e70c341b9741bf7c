"""The tables of the library's README name every public symbol, and nothing that is not there."""

import importlib
import re
from pathlib import Path

import pytest

import attention_jax
from tests.contract.test_docstrings import MODULES

README = (Path(__file__).parents[2] / "attention_jax" / "README.md").read_text(encoding="utf-8")
HEAD = "| mechanism | paper | function | cost | implementations |\n|---|---|---|---|---|\n"
TABLE = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for table in README.split(HEAD)[1:]
    for line in table.split("\n\n")[0].splitlines()
]


def named(functions):
    """Return what a cell names, in order: a bare name belongs to the module named last."""
    module, found = attention_jax, []
    for dotted in re.findall(r"`([\w.]+)`", functions):
        *owner, name = dotted.split(".")
        if owner:
            module = importlib.import_module(f"attention_jax.{'.'.join(owner)}")
        assert hasattr(module, name), f"{module.__name__} has no {name}"
        found.append((name, getattr(module, name)))
    return found


def symbols(module):
    return [(name, getattr(module, name)) for name in getattr(module, "__all__", [])]


def is_twin(module):
    """Linen has the names of NNX, which a contract of modules checks."""
    return module.__name__.startswith("attention_jax.linen")


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_every_row_says_what_how_and_at_which_cost(row):
    mechanism, _, functions, cost, implementations = row
    assert mechanism and cost and implementations
    assert named(functions)


def test_every_public_symbol_is_in_the_table():
    listed = [entry for row in TABLE for entry in named(row[2])]
    public = {
        f"{module.__name__}.{name}": (name, symbol)
        for module in [attention_jax, *MODULES]
        if not is_twin(module)
        for name, symbol in symbols(module)
        if not hasattr(symbol, "__path__") and type(symbol).__name__ != "module"
    }
    assert len(public) > 150
    missing = [
        path
        for path, (name, symbol) in public.items()
        if not any(name == other and symbol is found for other, found in listed)
    ]
    assert not missing, f"add to the tables of attention_jax/README.md: {missing}"

"""Names that users choose are printed as they are, without the markup of rich."""

import types

import pytest
from rich.table import Table

from experiments.command_line import terminal, two_lines
from experiments.translate import run
from experiments.translate.config import Config
from experiments.translate.prepare import Run

NAMED = "runs/br[/x] [bold]:smile: 12"


def test_brackets_and_colons_mean_nothing(capsys):
    console = terminal()
    table = Table(NAMED, title=NAMED)
    table.add_row(two_lines(NAMED, "[5, 6]"))
    for part in (NAMED, table):
        console.print(part)
    printed = capsys.readouterr().out
    assert printed.count(NAMED) == 4 and "[5, 6]" in printed


def test_where_nobody_looks_there_is_room_for_tables():
    assert terminal().width == 140


def test_a_remark_stands_below_its_value():
    assert two_lines("5.5", "5–6").plain == "5.5\n5–6"
    assert two_lines("5.5", "").plain == "5.5"


@pytest.mark.parametrize("name", ["c/[x]b.tsv", "c/[/x].tsv"])
def test_a_run_names_its_data_as_they_are_named(name, capsys):
    corpus = types.SimpleNamespace(
        name=name, train=(), source_vocabulary=(), target_vocabulary=(), notices=()
    )
    task = types.SimpleNamespace(corpus=corpus, sets={})
    run.describe(Run(Config(data=name), task, {}))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{name}: 0 train pairs")
    assert f"folder: {Config(data=name).directory}\n" in printed

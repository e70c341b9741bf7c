"""The table says what was measured, and nothing where nothing was."""

import pytest

from experiments.translate import table


def summary(*values):
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"values": values, "mean": None, "low": None, "high": None}
    bounds = (None, None) if len(values) == 1 else (min(known), max(known))
    return {
        "values": values, "mean": sum(known) / len(known), "low": bounds[0], "high": bounds[1]
    }  # fmt: skip


def results(seeds, error, steps):
    metrics = {name: summary(*[1.0] * seeds) for name, _, _ in table.COLUMNS}
    metrics |= {"alignment_error": error, "steps_to_90": steps}
    mechanism = {
        "score": "dot",
        "parameters": 1234,
        "metrics": metrics,
        "tokens_per_second": 2e3,
        "extra": {"long": {"exact_match": summary(*[12.5] * seeds)}},
    }
    compared = {
        "first": "dot",
        "second": "none",
        "metric": "bleu",
        "difference": {"mean": 0.5, "low": None, "high": None},
        "p_value": None,
        "conclusive": False,
    }
    return {
        "config": {"seeds": seeds, "beam_size": 1, "length_penalty": 0.6},
        "data": {"pairs": {"long": 7}},
        "mechanisms": [mechanism],
        "comparisons": [compared],
    }


@pytest.mark.parametrize(
    ("error", "steps", "shown"),
    [
        (summary(5.0, 6.0), summary(50, 100), {"AER %": "5.5", "steps to 90%": "75"}),
        (summary(5.0, 6.0), summary(50, None), {"AER %": "5.5", "steps to 90%": "–"}),
        (summary(5.0, 6.0), summary(None, None), {"AER %": "5.5"}),
        (None, summary(None, None), {}),
    ],
)
def test_columns_of_what_nobody_has_are_left_out(error, steps, shown):
    found = results(2, error, steps)
    (row,) = table.rows(found)
    cells = dict(zip(table.header(found), row, strict=True))
    for name in ("AER %", "steps to 90%"):
        assert (cells[name].value if name in cells else None) == shown.get(name)
    assert cells["tokens/s"].value == "2k"
    if steps["values"] == (50, None):
        assert cells["steps to 90%"].interval == "1 of 2 seeds"


def test_one_seed_has_no_interval():
    found = results(1, None, summary(None))
    assert table.over_seeds(found) == "One seed, so that there is no interval"
    assert table.compared(found) == [["BLEU on test", "+0.5", "–", "–", "one seed is too few"]]
    assert table._on_extra(found, "long") == "long, 7 pairs: exact match % dot 12.5"


def test_decoding_is_named():
    found = results(1, None, summary(None))
    assert table.decoding(found) == "greedy decoding"
    found["config"]["beam_size"] = 4
    assert table.decoding(found) == "beam of 4, length penalty 0.6"


def test_several_seeds_have_one():
    found = results(3, None, summary(None, None, None))
    assert table.over_seeds(found) == (
        "Mean and 95% bootstrap interval over 3 seeds; 3 values cover their mean in at most about "
        "75% of cases"
    )
    found["config"]["seeds"] = 8
    assert table.over_seeds(found) == "Mean and 95% bootstrap interval over 8 seeds"
    found["config"]["seeds"] = 3
    assert table.compared(found)[0][-1] == "3 seeds are too few"


def test_the_more_is_compared_the_more_seeds_are_needed():
    found = results(6, None, summary(*[None] * 6))
    assert table.compared(found)[0][-1] != "6 seeds are too few"
    found["comparisons"] *= 4
    assert table.compared(found)[0][-1] == "6 seeds are too few"
    assert table._on_extra(found, "long") == "long, 7 pairs: exact match % dot 12.5 (12.5–12.5)"

"""What translators look at is kept after each validation, and the report makes a page of it."""

import json
import types

import numpy as np
import pytest

from experiments.data.corpus import Pair
from experiments.data.vocabulary import Vocabulary
from experiments.translate import looking
from experiments.translate.log import Log

GOLD = frozenset({(0, 1), (1, 0)})
PAIRS = (Pair(("a", "b"), ("c", "d", "e"), GOLD, GOLD), Pair(("b",), ("c",)))


def kept(tmp_path, score, steps, shapes):
    """Write random weights of some steps to a log, read them, and return them with the records."""
    log, drawn = Log(tmp_path / "attention.jsonl"), np.random.default_rng(len(score))
    given = [{name: drawn.random(shape) for name, shape in shapes.items()} for _ in steps]
    for step, weights in zip(steps, given, strict=True):
        log.append(looking.record(score, step, weights))
    return log.records(score), given


def test_scores_and_seeds_are_beside_each_other(tmp_path):
    shapes = {"cross-attention": (2, 2, 1, 1, 4, 3)}
    dot, of_dot = kept(tmp_path, "dot", (50, 100, 150), shapes)
    additive, of_additive = kept(tmp_path, "additive", (100, 150), shapes)
    none = [looking.record("none", step, {}) for step in (100, 150)]
    found = looking.explorer({"dot": dot, "none": none, "additive": additive}, PAIRS, False)
    assert found is not None and list(found.views) == ["sentence 1", "sentence 2"]
    first, second = found.views.values()
    assert first.queries == ["c", "d", "e", "<eos>"] and first.keys == ["a", "b", "<eos>"]
    assert first.gold == [(0, 1), (1, 0)] and second.gold == []
    assert first.layers == ["dot", "additive"] and first.steps == [100, 150]
    assert second.weights.shape == (2, 2, 2, 2, 2)
    for step, (one, other) in enumerate(zip(of_dot[1:], of_additive, strict=True)):
        for score, given in enumerate((one, other)):
            expected = given["cross-attention"][:, 0, 0, 0]
            np.testing.assert_allclose(first.weights[step, score], expected, atol=1e-3)
    assert "additive" in found.page()


def test_layers_and_heads_of_a_transformer(tmp_path):
    shapes = {
        "cross-attention": (3, 2, 2, 4, 4, 3),
        "encoder": (3, 2, 2, 4, 3, 3),
        "decoder": (3, 2, 2, 4, 4, 4),
    }
    records, given = kept(tmp_path, "dot", (5, 10), shapes)
    found = looking.explorer({"dot": records}, PAIRS, True)
    assert found is not None and list(found.views) == [
        f"sentence {number}, {name}" for number in (1, 2) for name in shapes
    ]
    cross, encoder, decoder, *_ = found.views.values()
    assert cross.gold and not encoder.gold and not decoder.gold
    assert (encoder.queries, decoder.queries) == (cross.keys, cross.queries)
    assert encoder.keys == cross.keys and decoder.keys == cross.queries
    expected = np.stack([weights["encoder"][0, 0] for weights in given])
    np.testing.assert_allclose(encoder.weights, expected, atol=1e-3)
    assert '"head 3"' in found.page()


def test_many_weights_lose_steps_but_not_the_last(tmp_path, monkeypatch):
    shapes = {"cross-attention": (1, 2, 1, 1, 4, 3)}
    records, _ = kept(tmp_path, "dot", range(10, 110, 10), shapes)
    monkeypatch.setattr(looking, "_MOST", 3 * 24)
    found = looking.explorer({"dot": records}, PAIRS, False)
    assert found is not None and found.views["sentence 1"].steps == [10, 50, 100]
    monkeypatch.setattr(looking, "_MOST", 1)
    found = looking.explorer({"dot": records}, PAIRS, False)
    assert found is not None and found.views["sentence 1"].steps == [100]


def test_nothing_kept_is_no_page():
    assert looking.explorer({"dot": []}, PAIRS, False) is None
    assert looking.explorer({"none": [looking.record("none", 5, {})]}, PAIRS, False) is None


def test_rows_of_the_chosen_sentences():
    corpus = types.SimpleNamespace(
        source_vocabulary=Vocabulary("ab"), target_vocabulary=Vocabulary("cde")
    )
    task = types.SimpleNamespace(sets={"valid": types.SimpleNamespace(pairs=PAIRS)}, corpus=corpus)
    found = looking.sentences(task)  # pyright: ignore[reportArgumentType]
    assert found.pairs == list(PAIRS)
    assert found.source.tolist() == [[4, 5, 2], [5, 2, 0]]
    assert found.target.tolist() == [[4, 5, 6, 2], [4, 2, 0, 0]]


@pytest.mark.slow
def test_the_report_of_a_run_has_what_was_kept(done):
    folder = done[1]
    lines = (folder / "attention.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [1000, 2000, 3000, 4000]
    report = (folder / "report.html").read_text("utf-8")
    assert report.count('class="attention-explorer"') == 1
    assert '"steps": ["1000", "2000", "3000", "4000"]' in report

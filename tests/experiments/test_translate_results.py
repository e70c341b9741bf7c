"""What a run says of its numbers: differences no louder than p, and what BLEU was taken of."""

import shutil
import types
from typing import Any

import pytest

from experiments.command_line import UsageError
from experiments.data.corpus import Pair
from experiments.files import write_sealed
from experiments.metrics import CLASSES
from experiments.significance import holm, sign_flip_p_value
from experiments.translate import report, results
from experiments.translate.config import Config
from experiments.translate.looking import pictured
from experiments.translate.marks import write_marked
from experiments.translate.prepare import Run
from experiments.translate.results import speed

HIGH = [90.0, 91.0, 92.0, 90.0, 91.0, 92.0, 93.0, 90.0]
LOW = [40.0, 42.0, 41.0, 44.0, 40.0, 41.0, 42.0, 45.0]
NEAR = [90.0, 91.5, 91.0, 90.5, 91.0, 91.0, 93.5, 90.0]


def test_an_outcome_is_of_its_run_and_its_score(tmp_path):
    write_sealed(tmp_path / "config.json", {"run": "its mark"})
    path, copy = tmp_path / "dot.json", tmp_path / "additive.json"
    write_marked(path, tmp_path, {"score": "dot"})
    assert results.read_outcome(path, tmp_path) == {"score": "dot"}
    shutil.copy(path, copy)
    with pytest.raises(UsageError) as error:
        results.read_outcome(copy, tmp_path)
    remedy = "delete it, and the same command measures again what was trained."
    assert str(error.value) == f"{copy} was measured of dot; {remedy}"
    write_sealed(tmp_path / "config.json", {"run": "that of another"})
    with pytest.raises(UsageError) as error:
        results.read_outcome(path, tmp_path)
    assert str(error.value) == f"{path} was written by another run; {remedy}"


def outcome(score, values):
    measures = ("loss", "exact_match", "token_accuracy", "bleu", "chrf")
    test = dict.fromkeys(measures, values) | dict.fromkeys(("alignment_error", *CLASSES))
    return {
        "score": score,
        "parameters": 100,
        "sizes": {},
        "compile_seconds": 1.0,
        "train_seconds": 2.0,
        "tokens_per_second": 3000.0,
        "sets": {"valid": test, "test": test | {"bleu": HIGH}},
        "steps_to_90": [None] * len(values),
        "mean_exact_match": values,
        "pictures": [{"gold": None}],
        "samples": [],
    }


def summary(config, outcomes, at_spaces=True):
    pairs = (Pair(("a",), ("b",)),)
    corpus = types.SimpleNamespace(
        name=config.data,
        train=pairs,
        source_vocabulary="ab",
        target_vocabulary="ab",
        notices=(),
        at_spaces=at_spaces,
    )
    sets = {"test": types.SimpleNamespace(pairs=pairs)}
    task: Any = types.SimpleNamespace(corpus=corpus, sets=sets)
    return results.summarize(Run(config, task, {}), outcomes, {})


def test_all_metrics_of_a_run_are_corrected_together():
    config = Config(seeds=8)
    found = summary(config, [outcome("additive", HIGH), outcome("scaled_dot", LOW)])["comparisons"]
    assert [c["metric"] for c in found] == ["exact_match", "bleu", "valid_loss", "mean_exact_match"]
    alone = sign_flip_p_value([a - b for a, b in zip(HIGH, LOW, strict=True)])
    assert [c["p_value"] for c in found] == pytest.approx(holm([alone, 1.0, alone, alone]))
    assert all("corrected for 4 comparisons" in c["sentence"] for c in found)
    assert found[0]["sentence"].endswith(": additive is higher than scaled_dot.")


def test_seeds_that_are_enough_for_one_test_may_be_too_few_for_all():
    config = Config(seeds=6)
    found = summary(config, [outcome("additive", HIGH[:6]), outcome("scaled_dot", LOW[:6])])
    assert not any(c["conclusive"] for c in found["comparisons"])
    assert found["comparisons"][0]["sentence"].endswith(
        "(paired permutation test, p = 0.12, corrected for 4 comparisons): too few seeds to "
        "conclude anything, because with 6 the smallest possible p is 0.12; at least 8 are needed "
        "for p <= 0.05."
    )


def test_scores_that_are_not_compared_are_told():
    outcomes = [outcome("additive", HIGH), outcome("scaled_dot", NEAR), outcome("none", LOW)]
    found = summary(Config(seeds=8, scores=("additive", "scaled_dot", "none")), outcomes)
    assert {(c["first"], c["second"]) for c in found["comparisons"]} == {("additive", "scaled_dot")}
    assert found["comparisons"][0]["sentence"].endswith(
        ", which does not show that they are equal. Of the 3 scores only the first two are "
        "compared; experiments.translate_sweep compares all pairs."
    )
    assert summary(Config(seeds=8, scores=("dot",)), outcomes[:1])["comparisons"] == []


@pytest.mark.parametrize(
    ("lowercase", "at_spaces", "case"),
    [(True, False, "lc"), (False, False, "mixed"), (True, True, "mixed"), (False, True, "mixed")],
)
def test_signatures_say_whether_words_were_lower_cased(lowercase, at_spaces, case):
    config = Config(data="x.tsv", lowercase=lowercase)
    found = summary(config, [outcome("dot", HIGH)], at_spaces=at_spaces)["signatures"]
    assert found["bleu"].startswith(f"nrefs:1|case:{case}|eff:no|tok:13a|")
    assert found["chrf"].startswith(f"nrefs:1|case:{case}|eff:yes|nc:6|")


@pytest.mark.parametrize(
    ("scores", "lead"),
    [
        (("none",), "A translator without attention, trained on 1 sentence pairs"),
        (("dot",), "A translator with attention, trained on"),
        (("dot", "none"), "Translators that differ only in the score of their attention,"),
    ],
)
def test_a_report_says_what_it_is_about_and_replaces_an_old_one_as_a_whole(scores, lead, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "learning_curves.svg").write_text("<svg/>")
    path = tmp_path / "report.html"
    path.write_text("the old one")
    outcomes = [outcome(score, HIGH) for score in scores]
    with path.open() as reader:
        report.write(summary(Config(seeds=8, scores=scores), outcomes), outcomes, [], tmp_path)
        assert reader.read() == "the old one"
    assert f'<p class="lead">{lead}' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "known", "unknown"),
    [
        ("bigru", ["query", "bridge"], ["heads", "layers", "positions"]),
        ("transformer", ["heads", "layers", "positions"], ["query", "bridge"]),
    ],
)
def test_a_report_lists_what_its_architecture_knows(model, known, unknown):
    listed = report._settings(Config(model=model).identity)
    assert {"model", "width", *known} <= listed.keys()
    assert not listed.keys() & set(unknown)


def pair(source, target, *links):
    words = tuple(f"s{n}" for n in range(source)), tuple(f"t{n}" for n in range(target))
    return Pair(*words, frozenset(links), frozenset(links))


def test_sentences_of_readable_length_whose_words_change_places_most_are_drawn():
    crossed, straight = ((0, 1), (1, 0)), ((0, 0), (1, 1))
    pairs = [
        pair(5, 5, *crossed),
        pair(15, 15, *crossed),
        pair(9, 21, *crossed),
        pair(6, 6, *straight),
        pair(14, 20, *crossed),
        Pair(("a",) * 8, ("b",) * 8),
        pair(9, 9, *straight),
    ]
    assert pictured(pairs) == [4, 3, 5]
    assert pictured(pairs[:3]) == [0, 1, 2]


def test_speed_is_read_from_the_log():
    log = [
        {"step": 25, "tokens": 100, "seconds": 2.0},
        {"step": 25, "exact_match": [10.0, 20.0]},
        {"step": 50, "tokens": 200, "seconds": 1.0},
        {"step": 50, "exact_match": [90.0, 40.0]},
    ]
    assert speed(log) == {
        "train_seconds": 3.0,
        "tokens_per_second": 100.0,
        "steps_to_90": [50, None],
        "mean_exact_match": [50.0, 30.0],
    }

"""Which sentences are drawn, and how fast a mechanism learned."""

from experiments.data.corpus import Pair
from experiments.translate.results import pictured, speed


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

"""Real corpora, where they are present beside the repository."""

from functools import cache
from pathlib import Path

import pytest

from experiments.data import Sizes, detokenize, load
from experiments.metrics import bleu

DATA = Path(__file__).parents[2] / "../shared/data"


@cache
def corpus(name, **options):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not there")
    return load(str(DATA / name), **options)


def sources(pairs):
    return {pair.source for pair in pairs}


def test_multi30k():
    multi30k = corpus("multi30k")
    assert [len(split) for split in (multi30k.train, multi30k.valid, multi30k.test)] == [
        *(28_997, 1_014, 1_000)
    ]
    assert multi30k.notices[:2] == (
        "The test set is test_2016_flickr.",
        "train: 3 repeated pairs were removed.",
    )
    assert "dog" in multi30k.source_vocabulary and "hund" in multi30k.target_vocabulary
    assert 5_000 < len(multi30k.source_vocabulary) < len(multi30k.target_vocabulary) < 10_000
    path = DATA / "multi30k" / "test_2016_flickr.de"
    lines = [line.lower() for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    texts = [detokenize(pair.target) for pair in multi30k.test]
    assert sum(a != b for a, b in zip(texts, lines, strict=True)) < 10
    assert bleu([p.target for p in multi30k.test], [p.target for p in multi30k.test]).value > 99.99


def test_multi30k_the_other_way():
    there, back = (
        corpus("multi30k"),
        corpus("multi30k", source="de", target="en", sizes=Sizes(train=100)),
    )
    assert [pair.source for pair in there.test] == [pair.target for pair in back.test]
    assert [pair.target for pair in there.valid] == [pair.source for pair in back.valid]


def test_tatoeba():
    tatoeba = corpus("tatoeba-deu-eng.tsv")
    name = "tatoeba-deu-eng.tsv"
    assert f"{name}: line 1 (1, 2) was read as the names of columns." in tatoeba.notices
    splits = (tatoeba.train, tatoeba.valid, tatoeba.test)
    assert [len(split) for split in splits[1:]] == [1_000, 1_000]
    # 50002 lines, without the header and the repeated pairs; none is lost.
    repeated = next(n for n in tatoeba.notices if "repeated" in n)
    assert sum(map(len, splits)) == 50_001 - int(repeated.split(" ")[1])
    assert sum(map(len, map(sources, splits))) == len(set.union(*map(sources, splits)))
    assert {"the", "is"} < set(tatoeba.source_vocabulary.words)
    assert {"ist", "nicht"} < set(tatoeba.target_vocabulary.words)


def test_scan():
    scan = corpus("scan-hard-attention")
    assert len(scan.train) + len(scan.valid) == 16_728 and len(scan.test) == 4_182
    first = next(
        pair
        for pair in scan.train + scan.valid
        if " ".join(pair.source) == "run opposite left after walk right ."
    )
    assert " ".join(first.target) == "I_TURN_RIGHT I_WALK I_TURN_LEFT I_TURN_LEFT I_RUN"
    assert first.sure == first.possible == {(5, 0), (4, 1), (2, 2), (2, 3), (0, 4)}
    actions = {"I_WALK": {"walk"}, "I_RUN": {"run"}, "I_JUMP": {"jump"}, "I_LOOK": {"look"}}
    actions |= {f"I_TURN_{side.upper()}": {side, "turn"} for side in ("left", "right")}
    for pair in scan.train + scan.test:
        assert pair.sure is not None and len(pair.sure) == len(pair.target)
        for i, j in pair.sure:
            assert pair.source[i] in actions[pair.target[j]]
    assert not any("<unk>" in notice for notice in scan.notices)

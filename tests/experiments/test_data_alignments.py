"""Gold alignments as others publish them, read as they are; text as it is cut at spaces."""

import itertools

import pytest

from experiments.data import DataError, Reading, load
from experiments.data.files import Reader
from experiments.translate.config import Config
from experiments.translate.data import load_task, load_tokenizer, save_tokenizer

# The links of two sentences of three and of two words, in the notations of several projects.
SURE = [{(0, 0), (2, 1)}, {(1, 1)}]
POSSIBLE = [{(0, 0), (2, 1), (1, 2)}, {(1, 1)}]
SENTENCES = [("A b .", "X Y Z"), ("c d", "V W")]
HINT = "; counted from {} all links fit: set --links_from={}."


def read(folder, table=None, **given):
    """The training pairs of a table, or of a folder, and what is told."""
    reader = Reader("en", "de", True, **given)
    data = folder if table is None else folder / "a.tsv"
    if table is not None:
        data.write_text(table)
    return reader.read_splits(str(data))[0]["train"], reader.notices


def files(folder, links, languages="en-de"):
    for language, lines in zip(("en", "de"), zip(*SENTENCES, strict=True), strict=True):
        (folder / f"train.{language}").write_text("".join(f"{line}\n" for line in lines))
    (folder / f"train.{languages}.align").write_text(links)


def check(pairs):
    assert [set(pair.sure or ()) for pair in pairs] == SURE
    assert [set(pair.possible or ()) for pair in pairs] == POSSIBLE
    assert [(" ".join(p.source), " ".join(p.target)) for p in pairs] == SENTENCES


@pytest.mark.parametrize(
    ("links", "first"),
    [
        ("0-0 1?2 2-1;1-1", 0),
        ("0-0 1p2 2-1;1-1", 0),
        ("1-1 2p3 3-2;2-2", 1),
        ("1-1 2?3 3-2;2-2", 1),
    ],
)
@pytest.mark.parametrize("separator", ["\t", " ||| "])
def test_links_of_a_table(links, first, separator, tmp_path):
    rows = zip(SENTENCES, links.split(";"), strict=True)
    table = "".join(separator.join((*both, row)) + "\n" for both, row in rows)
    pairs, notices = read(tmp_path, table, links_from=first)
    check(pairs)
    assert not any("links_from" in notice for notice in notices)


NAACL = "0001 1 1 S\n1 3 2 S\n\n1 2 3 P 0.5\n0001 0 3 S\n2 2 2\n2 1 0 P\n"


def test_links_of_the_shared_tasks(tmp_path):
    """A line for each link, counted from 1; no link to 0, the empty word."""
    files(tmp_path, NAACL)
    check(read(tmp_path)[0])
    # Beside a table, of which line 1 names the columns.
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "a.en-de.align").write_text(NAACL)
    table = "en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in SENTENCES)
    check(read(folder, table)[0])
    # Of the other direction, and without letters.
    lines = [line.split()[:3] for line in NAACL.splitlines() if "P" not in line]
    files(
        tmp_path,
        "".join(f"{' '.join((n, j, i))}\n" for n, i, j, *_ in filter(None, lines)),
        "de-en",
    )
    (tmp_path / "train.en-de.align").unlink()
    assert [set(pair.possible or ()) for pair in read(tmp_path)[0]] == SURE


def test_text_of_the_shared_tasks(tmp_path):
    """Sentences bear their numbers, which are no words of them."""
    files(tmp_path, NAACL)
    for path in (tmp_path / "train.en", tmp_path / "train.de"):
        lines = path.read_text().splitlines()
        numbered = [f"<s snum={n:04d}> {line} </s>\n" for n, line in enumerate(lines, 1)]
        path.write_text("".join([*numbered, "\n"]))  # a blank line is no sentence
    pairs, notices = read(tmp_path)
    check(pairs)
    assert "train.de: <s snum=...> and </s> were left out of its lines." in notices
    path.write_text("".join(reversed(numbered)))
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert str(error.value) == (
        f"{path} line 1 has snum=0002, but gold alignments need the number of the line; number "
        "the sentences from 1."
    )


@pytest.mark.parametrize(
    ("links", "message"),
    [
        ("1 1 1 S\n3 1 1 P\n",
         "line 2 is of sentence 3, but there are 2 sentences, counted from 1."),
        (
            "1 1 1 S\n2 2 5 P\n",
            "sentence 2: the alignment links 2 to 5, outside of 2 source and 2 target tokens "
            "counted from 1.",
        ),
        (
            "1-1\n2-2\n",
            "line 2: the alignment links 2 to 2, outside of 2 source and 2 target tokens counted "
            "from 0" + HINT.format(1, 1),
        ),
        (
            "0-1\n2-2\n",
            "line 2: the alignment links 2 to 2, outside of 2 source and 2 target tokens counted "
            "from 0.",
        ),
        ("1-1\n", "{}.en has 2 lines but {}.en-de.align has 1; line n of one must belong to line "
                  "n of the other."),
    ],
)  # fmt: skip
def test_links_that_do_not_fit(links, message, tmp_path):
    files(tmp_path, links)
    with pytest.raises(DataError) as error:
        read(tmp_path)
    path = tmp_path / "train"
    assert str(error.value).removeprefix(f"{path}.en-de.align ") == message.format(path, path)


def test_counted_otherwise_than_was_said(tmp_path):
    with pytest.raises(DataError) as error:
        read(tmp_path, "a b\tx y\t0-0 1-1\n", links_from=1)
    assert str(error.value) == (
        f"{tmp_path}/a.tsv line 1: the alignment links 0 to 0, outside of 2 source and 2 target "
        "tokens counted from 1" + HINT.format(0, 0)
    )


def test_links_that_would_fit_counted_from_1_are_told(tmp_path):
    told = (
        f"{tmp_path}/a.tsv: no link is of position 0, and all would fit counted from 1 too; if "
        "they count so, set --links_from=1."
    )
    pairs, notices = read(tmp_path, "a b c\tx y\t1-1\nb c\tx y\t1p1\n")
    assert told in notices and set(pairs[0].sure or ()) == {(1, 1)}
    pairs, notices = read(tmp_path, "a b c\tx y\t1-1\n", links_from=1)
    assert told not in notices and set(pairs[0].sure or ()) == {(0, 0)}
    assert told not in read(tmp_path, "a b c\tx y\t1-0\nb c\tx y\t1p1\n")[1]


def test_text_between_bars(tmp_path):
    """As fast_align reads it; a table with tabs may have bars in its text."""
    lines = "".join(f"number {n} ||| zahl {n}\n" for n in range(10))
    assert all(pair.target[0] == "zahl" for pair in read(tmp_path, lines)[0])
    assert read(tmp_path, "a ||| b\tc\n")[0][0].target == ("c",)
    with pytest.raises(DataError) as error:
        read(tmp_path, "a ||| b\n\nc\n")
    assert str(error.value) == (
        f"{tmp_path}/a.tsv line 3 has no |||, but source ||| target was expected, as in the lines "
        "before; put ||| between the two sentences."
    )


def test_words_as_the_text_has_them(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"Hund. {n}\tDog's {n}\n" for n in range(9)))
    cut = load(str(path), min_count=1, reading=Reading(at_spaces=True))
    assert cut.at_spaces and {pair.source[0] for pair in cut.train} == {"Hund."}
    assert {pair.target[0] for pair in cut.train} == {"Dog's"}
    # Without gold alignments in training, those of the test set are kept, whatever its words.
    path.rename(tmp_path / "train.tsv")
    (tmp_path / "test.tsv").write_text("Hund. 1\tDog's 1\t0-0 1-1\n")
    (tmp_path / "valid.tsv").write_text("Hund. 1\tDog's 1\n")
    for at_spaces, links in ((True, {(0, 0), (1, 1)}), (False, None)):
        corpus = load(str(tmp_path), min_count=1, reading=Reading(at_spaces=at_spaces))
        assert corpus.test[0].sure == links
    said = itertools.chain(cut.notices, load(str(tmp_path), min_count=1).notices)
    assert any("were left out: 1" in notice for notice in said)


def test_links_count_from_0_or_1():
    with pytest.raises(DataError, match=r"^links_from is 2, but 0 or 1 is needed.$"):
        load("x.tsv", reading=Reading(links_from=2))


def test_the_flags_are_of_the_run(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"Hund. {n}\tDog's {n}\n" for n in range(9)))
    (tmp_path / "a.en-de.align").write_text("1-1 2p2\n" * 9)
    given = {"data": str(path), "steps": 1, "batch_size": 1, "buckets": 1, "seeds": 1}
    config = Config(**given, links_from=1, min_count=1)
    pairs = load_task(config).corpus.train
    assert {pair.sure for pair in pairs} == {frozenset({(0, 0)})}
    (tmp_path / "a.en-de.align").unlink()
    config = Config(**given, words="spaces", min_count=1)
    corpus = load_task(config).corpus
    assert corpus.at_spaces and "Hund." in corpus.source_vocabulary
    save_tokenizer(tmp_path, corpus, 9, config)
    assert load_tokenizer(tmp_path).words("Hund. da") == ("Hund.", "da")
    for name in ("words", "links_from"):
        assert config.identity[name] == getattr(config, name)


def test_a_file_counted_from_1_is_refused_in_one_line(tmp_path, translate, capsys):
    path = tmp_path / "a.tsv"
    path.write_text("a b ||| x y ||| 1-1 2p2\n" * 3)
    flags = (f"--data={path}", f"--workdir={tmp_path}/run")
    assert translate(*flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(HINT.format(1, 1) + "\n")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tsv"]

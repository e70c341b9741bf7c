"""Corpora from files: every mistake has its message; lines of two files stay in step."""

import pathlib

import pytest

from experiments.data import DataError, Pair, Reading, Sizes, load

WORDS = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"]
TABLE = "".join(f"number {n}\tzahl {word}\n" for n, word in enumerate(WORDS))
LENIENT = {"min_count": 1}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def everything(corpus):
    splits = (corpus.train, corpus.valid, corpus.test, *corpus.extra.values())
    return {pair for split in splits for pair in split}


def refused(data, **options):
    with pytest.raises(DataError) as error:
        load(str(data), **options)
    message = str(error.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_tsv(write):
    corpus = load(write("a.tsv", TABLE), **LENIENT)
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [8, 1, 1]
    assert everything(corpus) == {
        Pair(("number", str(n)), ("zahl", word)) for n, word in enumerate(WORDS)
    }
    assert corpus == load(corpus.name, **LENIENT)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: text.replace("number", "\u2028number").replace("zahl", "\x85zahl\x0b\x0c"),
        lambda text: text.replace("\n", "\tCC-BY 2.0 (France)\n"),
    ],
    ids=["bom", "crlf", "no-final-newline", "unicode-line-ends", "third-column"],
)
def test_harmless_differences_do_not_matter(write, change):
    plain = load(write("plain.tsv", TABLE), **LENIENT)
    changed = load(write("changed.tsv", change(TABLE)), **LENIENT)
    assert (changed.train, changed.valid, changed.test) == (plain.train, plain.valid, plain.test)


def test_a_third_column_that_is_no_alignment_is_reported(write):
    corpus = load(write("a.tsv", TABLE.replace("\n", "\tCC-BY\n")), **LENIENT)
    assert "a.tsv: its third column is no alignment: ignored." in corpus.notices


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x0c", "\x85", "\x1c", "\r"])
def test_strange_line_ends_inside_a_line_never_shift_pairs(write, separator):
    write("d/train.en", "".join(f"number{separator}{n}\n" for n in range(10)))
    data = write("d/train.de", "".join(f"zahl {word}\n" for word in WORDS)).removesuffix(
        "/train.de"
    )
    assert everything(load(data, **LENIENT)) == {
        Pair(("number", str(n)), ("zahl", word)) for n, word in enumerate(WORDS)
    }


def test_empty_lines_are_skipped_and_counted(write):
    path = write("a.tsv", TABLE + "\n  \nno translation\t\n\tohne quelle\n")
    corpus = load(path, **LENIENT)
    assert len(everything(corpus)) == 10
    notice = f"{path}: lines with an empty sentence were skipped: 4, the first is line 11."
    assert notice in corpus.notices


def test_long_pairs_are_dropped_and_counted_in_every_split(write):
    for split in ("train", "valid", "test"):
        write(f"d/{split}.en", "".join(f"{split} {n}\n" for n in range(5)))
        path = write(f"d/{split}.de", "a b c d\n" + 4 * "a b\n")
    corpus = load(path.removesuffix("/test.de"), max_length=3, min_count=1)
    assert len(everything(corpus)) == 12
    for split in ("train", "valid", "test"):
        notice = f"{split}: 1 of 5 pairs are longer than max_length=3 tokens and were dropped."
        assert notice in corpus.notices


def test_repeated_pairs_are_removed_from_training(write):
    corpus = load(write("a.tsv", TABLE + TABLE), **LENIENT)
    assert "train: 10 repeated pairs were removed." in corpus.notices
    assert len(everything(corpus)) == len(corpus.train) + len(corpus.valid) + len(corpus.test) == 10


def test_pairs_with_one_source_stay_in_one_split(write):
    text = "".join(f"source {n // 5}\ttarget {n}\n" for n in range(100))
    corpus = load(write("a.tsv", text), sizes=Sizes(valid=10, test=10))
    sources = [{p.source for p in s} for s in (corpus.train, corpus.valid, corpus.test)]
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [80, 10, 10]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 20


def test_header_names_and_numbers_choose_the_columns(write):
    plain = load(write("plain.tsv", TABLE), **LENIENT)
    named = write("named.tsv", "German\tenglish\n" + TABLE)
    turned = load(named, source="de", target="en", **LENIENT)
    assert turned.train == plain.train
    assert "named.tsv: line 1 (german, english) was read as the names of columns." in turned.notices
    by_number = load(write("numbers.tsv", "1\t2\n" + TABLE), source="2", target="1", **LENIENT)
    assert everything(by_number) == {Pair(p.target, p.source) for p in everything(plain)}
    assert (
        "numbers.tsv: column 2 is the source (2) and column 1 the target (1); source=1 with "
        "target=2 exchanges them." in by_number.notices
    )
    assert everything(load(named, source="en", target="de", **LENIENT)) == everything(by_number)


def test_gold_alignments_pharaoh_and_positions(write):
    text = "A b .\tX Y\t0-0 1?1\nb a\tY X\t1-1\nc\tX Y\t0 0 0\nd d\tX\t\n"
    corpus = load(write("a.tsv", text), **LENIENT)
    assert everything(corpus) == {
        Pair(("A", "b", "."), ("X", "Y"), frozenset({(0, 0)}), frozenset({(0, 0), (1, 1)})),
        Pair(("b", "a"), ("Y", "X"), frozenset({(1, 1)}), frozenset({(1, 1)})),
        Pair(("c",), ("X", "Y"), frozenset({(0, 0), (0, 1)}), frozenset({(0, 0), (0, 1)})),
        Pair(("d", "d"), ("X",)),
    }
    assert "a.tsv has gold alignments, so it was split at spaces only." in corpus.notices
    turned = load(corpus.name, source="2", target="1", **LENIENT)
    assert Pair(("X", "Y"), ("c",), *2 * (frozenset({(0, 0), (1, 0)}),)) in everything(turned)


PLAIN = "Haus Hund.\tHouse Dog.\nHund Haus.\tDog House.\n"
ALIGNED = "Haus Hund .\tHouse Dog .\t0-0 1-1 2-2\nHund. Haus\tDog. House\t0-0 1-1\n"


def test_all_sets_are_cut_into_words_as_the_training_set_is(write, tmp_path):
    write("train.tsv", PLAIN)
    write("val.tsv", PLAIN)
    write("test.tsv", ALIGNED)
    write("test_2.en", "Haus Hund.\n")
    write("test_2.de", "House Dog.\n")
    corpus = load(str(tmp_path), min_count=1)
    links = 2 * (frozenset({(0, 0), (1, 1), (2, 2)}),)
    first = Pair(("haus", "hund", "."), ("house", "dog", "."))
    second = Pair(("hund", ".", "haus"), ("dog", ".", "house"))
    assert corpus.test == (Pair(first.source, first.target, *links), second)
    assert corpus.extra == {"test_2": (first,)} and not corpus.at_spaces
    assert any("were left out: 1, the first is that of line 2." in n for n in corpus.notices)
    assert not any("split at spaces" in notice for notice in corpus.notices)


def test_all_sets_are_cut_at_spaces_where_training_has_gold_alignments(write, tmp_path):
    write("train.tsv", ALIGNED)
    write("val.tsv", PLAIN)
    write("test.tsv", ALIGNED)
    corpus = load(str(tmp_path), min_count=1)
    assert corpus.valid[0] == Pair(("Haus", "Hund."), ("House", "Dog."))
    assert set(corpus.test) == set(corpus.train) and corpus.at_spaces
    assert [n for n in corpus.notices if "split at spaces" in n] == [
        "train.tsv has gold alignments, so it was split at spaces only."
    ]
    assert "test.tsv" not in "".join(n for n in corpus.notices if "left out" in n)


@pytest.mark.parametrize("names", ["train valid test", "training val test", "train dev test_2016"])
@pytest.mark.parametrize("prefix", ["", "corpus.", "corpus[1]*."])
def test_folders_and_prefixes(write, tmp_path, names, prefix):
    for split, name in enumerate(names.split(" ")):
        for language in ("en", "de"):
            write(f"{prefix}{name}.{language}", f"{language} {split}\n" * (3 - split))
    corpus = load(str(tmp_path / prefix.removesuffix(".")), min_count=1)
    assert corpus.train == (Pair(("en", "0"), ("de", "0")),)
    assert corpus.valid == 2 * (Pair(("en", "1"), ("de", "1")),)
    assert corpus.test == (Pair(("en", "2"), ("de", "2")),)
    assert "train: 2 repeated pairs were removed." in corpus.notices
    assert ("The test set is test_2016." in corpus.notices) == ("2016" in names)


def test_further_test_sets_are_extra_and_languages_are_chosen(write, tmp_path):
    for name in ("train", "valid", "test_1", "test_2"):
        for language in ("en", "de", "fr"):
            write(f"{name}.{language}", f"{language} {name}\n")
    corpus = load(str(tmp_path), source="fr", target="en", min_count=1)
    assert corpus.test == (Pair(("fr", "test_1"), ("en", "test_1")),)
    assert corpus.extra == {"test_2": (Pair(("fr", "test_2"), ("en", "test_2")),)}


def test_a_prefix_without_splits_is_split(write, tmp_path):
    write("all.en", "".join(f"number {n}\n" for n in range(10)))
    write("all.de", "".join(f"zahl {word}\n" for word in WORDS))
    corpus = load(str(tmp_path / "all"), **LENIENT)
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [8, 1, 1]
    assert "test: split off from the training pairs, with other source sentences." in corpus.notices


def test_sizes_cut_and_say_so(write):
    path = write("a.tsv", TABLE)
    corpus = load(path, sizes=Sizes(train=3, valid=2, test=2), **LENIENT)
    assert [len(split) for split in (corpus.train, corpus.valid, corpus.test)] == [3, 2, 2]
    assert "train: 3 of 6 pairs are used." in corpus.notices
    larger = load(path, sizes=Sizes(train=5, valid=2, test=2), **LENIENT)
    assert (larger.train[:3], larger.test) == (corpus.train, corpus.test)
    assert (
        "train: 99 pairs were asked for, but there are 8."
        in load(path, sizes=Sizes(train=99), **LENIENT).notices
    )


def test_another_seed_splits_otherwise(write):
    path = write("a.tsv", TABLE)
    assert len({load(path, seed=seed, **LENIENT).test for seed in range(8)}) > 1


def test_vocabulary_limits_lowercase_and_the_share_of_unknown_words(write):
    path = write("a.tsv", "".join(f"The x{n % 7}\tDas y{n}\n" for n in range(100)))
    corpus = load(path, max_vocabulary=5, seed=1)
    assert corpus.source_vocabulary.words[4] == "the" and len(corpus.source_vocabulary) == 9
    assert corpus.target_vocabulary.words[4:] == ("das",)
    assert any("% of source and 50.0% of target tokens, in test" in n for n in corpus.notices)
    assert (
        load(path, reading=Reading(lowercase=False), max_vocabulary=5).source_vocabulary.words[4]
        == "The"
    )


def test_test_sentences_that_occur_in_training_are_counted(write, tmp_path):
    for language in ("en", "de"):
        write(f"train.{language}", "a\nb\nc\n")
        write(f"test.{language}", "a\nd\n")
        write(f"valid.{language}", "e\n")
    notices = load(str(tmp_path), min_count=1).notices
    assert "test: 1 of 2 source sentences occur in training as well." in notices


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a\tb\nü\tc\n".encode("latin-1"),
            "line 2 is not UTF-8 (byte 0xfc); if the file is Latin-",
        ),
        (TABLE.encode("utf-16"), "line 1 begins with the mark of UTF-16, but UTF-8 was expected; "),
        (TABLE.encode("utf-32"), "line 1 begins with the mark of UTF-32, but UTF-8 was expected; "),
        (TABLE.replace("\n", "\r"), "ends its lines with a carriage return alone, but line feeds "),
        (TABLE.encode("utf-16-le"), "line 1 has a NUL byte, so the file is binary or UTF-16, but "),
        (bytes(range(256)), "line 1 has a NUL byte, so the file is binary or UTF-16, but UTF-8 "),
        ("a\tb\nc\0\td\n", "line 2 has a NUL byte, so the file is binary or UTF-16, but UTF-8 "),
        ("a\tb\n\nno tab\n", "line 3 has no tab, but source<TAB>target was expected; put one tab"),
        ("", "is empty, but lines of text were expected; give another file."),
        ("\ufeff", "is empty, but lines of text were expected; give another file."),
        ("\n\t\n", "no line has both sentences; give full pairs."),
        ("1\t2\n", "no line has both sentences; give full pairs."),
        ("a\tb\n", "has 1 different source sentence, which cannot be split into train, valid and "),
        (
            "a\tb\nc\td\na\te\n",
            "has 2 different source sentences, which cannot be split into train,",
        ),
        (
            "a\tb\t0-0\nc\td\t0-1\n",
            "line 2: the alignment links 0 to 1, outside of 1 source and 1 ",
        ),
        ("a\tb\t0-0\nc\td\t0-x\n", "line 2: the alignment has the entry '0-x', which is neither "),
        ("a\tb\t0 0\nc d\te\t0 1 1\n", "line 2: the alignment has 3 positions for 1 target tokens"),
    ],
)
def test_malformed_tables(write, content, message):
    path = write("bad.tsv", content)
    told = refused(path)
    assert told.startswith(path) and message in told


def test_words_that_never_repeat_are_refused(write):
    told = refused(write("a.tsv", "a\tb\nc\td\ne\tf\n"))
    assert told.endswith("no word occurs min_count=2 times in the 1 training pairs; set a smaller "
                         "min_count.")  # fmt: skip


def test_all_pairs_too_long(write):
    assert refused(write("a.tsv", "a b\tb\nb b b\tc\nc c c\td\n"), max_length=1) == (
        "train: all 3 pairs are longer than max_length=1 tokens (the shortest has 2); set a larger "
        "max_length."
    )


def test_missing_files_and_misspelled_names(tmp_path):
    assert refused("gramar") == (
        "gramar does not exist: it is no generated corpus (grammar, numbers, copy, reverse), no "
        "file, no folder and no prefix of files like gramar.train.en; check the spelling and the "
        "path."
    )
    assert refused(tmp_path / "no.tsv").startswith(f"{tmp_path}/no.tsv does not exist: ")
    assert refused(tmp_path / "no" / "where").startswith(f"{tmp_path}/no/where does not exist: ")
    assert refused("") == "The name of the data is empty; name a generated corpus or a path."


def test_folder_and_file_confused(write, tmp_path):
    (tmp_path / "folder.tsv").mkdir()
    assert refused(tmp_path / "folder.tsv") == (
        f"{tmp_path}/folder.tsv is a folder where a .tsv file was expected; name a file."
    )
    (tmp_path / "d" / "train.en").mkdir(parents=True)
    write("d/train.de", "a\n")
    assert refused(tmp_path / "d") == (
        f"{tmp_path}/d/train.en is a folder where a file was expected; give a text file."
    )
    path = write("e/train.en", "a\nb\n")
    assert refused(path) == (
        f"{path} line 1 has no tab, but source<TAB>target was expected; put one tab between the "
        "two sentences, or name the folder or prefix of two files."
    )


def test_folders_that_lack_files(write, tmp_path):
    assert refused(tmp_path) == (
        f"{tmp_path} has neither train.en with train.de nor train.tsv; name another folder, or set "
        "source and target to the endings of its files."
    )
    write("train.en", "a\n")
    assert refused(tmp_path) == (
        f"{tmp_path}/train.en has no partner: {tmp_path}/train.de does not exist; both are needed."
    )
    assert refused(tmp_path, source="en", target="en") == (
        "source and target are both 'en'; name two different languages."
    )


def test_unequal_line_counts(write, tmp_path):
    write("train.en", "a\nb\nc")
    write("train.de", "a\nb\n")
    assert refused(tmp_path) == (
        f"{tmp_path}/train.en has 3 lines but {tmp_path}/train.de has 2; line n of one must "
        "translate line n of the other."
    )


def test_one_column_for_both_sides(write):
    path = write("a.tsv", "en\tde\n" + TABLE)
    assert refused(path, source="de", target="fr") == (
        f"{path}: source 'de' and target 'fr' are the same column; name two columns, or 1 and 2."
    )


def test_a_file_without_permission(write, monkeypatch):
    path = write("a.tsv", TABLE)

    def forbidden(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", forbidden)
    assert refused(path) == (
        f"{path} cannot be read: Permission denied; check the path, and who may read it."
    )


@pytest.mark.parametrize("name", ["a.tsv", "corpus", "."])
def test_a_folder_that_nobody_may_enter(name, write, monkeypatch):
    """It is not reported as missing."""
    folder = write("closed/train.tsv", TABLE).removesuffix("/train.tsv")
    stat = pathlib.Path.stat

    def forbidden(path, **options):
        if str(path).startswith(f"{folder}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(pathlib.Path, "stat", forbidden)
    assert refused(f"{folder}/{name}".removesuffix("/.")).endswith(
        " cannot be read: Permission denied; check the path, and who may read it."
    )


def test_a_name_that_no_file_can_have(tmp_path):
    assert "cannot be read: File name too long; check the path" in refused(tmp_path / (300 * "a"))


def test_blank_lines_are_where_they_like(write, tmp_path):
    """Before the names of columns, and at the end of one file of two or three."""
    names = "de\ten\n" + "".join(f"{line}\n" for line in TABLE.splitlines())
    plain, blank = (load(write("a.tsv", text), **LENIENT) for text in (names, f"\n\t\n{names}"))
    assert (blank.train, blank.valid) == (plain.train, plain.valid)
    assert "a.tsv: line 3 (de, en) was read as the names of columns." in blank.notices
    write("train.en", "a b\nc\n\nd\n \n")
    write("train.de", "x\ny\n\nz\n")
    write("train.en-de.align", "0-0\n0-0\n\n0-0\n\n\n\n")
    pairs = everything(load(str(tmp_path), **LENIENT))
    assert {(pair.source[0], pair.target[0]) for pair in pairs} == {
        ("a", "x"),
        ("c", "y"),
        ("d", "z"),
    }
    assert all(pair.sure == {(0, 0)} for pair in pairs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length is 0, but at least 1 token is needed."),
        ({"min_count": 0}, "min_count is 0, but at least 1 is needed to keep a word."),
        ({"max_vocabulary": 0}, "max_vocabulary is 0, but at least 1 word is needed."),
    ],
)
def test_arguments_out_of_range(write, options, message):
    assert refused("grammar", **options) == message
    assert refused(write("a.tsv", TABLE), **options) == message


@pytest.mark.parametrize("size", [{"train": 0}, {"valid": -1}, {"test": 0}])
def test_a_split_without_pairs(size):
    with pytest.raises(DataError) as error:
        Sizes(**size)
    ((split, number),) = size.items()
    assert str(error.value) == f"{split}_size is {number}, but at least 1 pair is needed."

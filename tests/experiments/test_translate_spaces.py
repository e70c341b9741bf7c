"""Links of scored and translated sentences count the words between spaces, as gold ones do."""

import numpy as np
import pytest

from experiments.command_line import UsageError
from experiments.data import Vocabulary
from experiments.translate import use
from experiments.translate.config import Config
from experiments.translate.data import Tokenizer
from experiments.translate.translators import Translators


class Copier(Translators):
    """Writes what it reads, and looks at the word that it writes."""

    def of_seed(self, seed):
        return self

    def translations(self, sentences):
        return list(sentences)

    def log_probabilities(self, pairs):
        return -np.arange(1.0, 1.0 + len(pairs))

    def weights(self, pairs):
        return [np.eye(len(pair.target) + 1, len(pair.source) + 1) for pair in pairs]


WORDS = "hello well-known dog house , . ! ' s 's \" ( )"


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Score or translate lines; return what is printed, what is told, and the alignments."""

    def asked(mode, text, score="dot", at_spaces=False, **given):
        path = tmp_path / "lines"
        path.write_text(text, "utf-8")
        links = {} if score == "none" else {"alignments": str(tmp_path / "links")}
        config = Config(
            mode=mode, workdir="run", input=str(path), scores=(score,), **links, **given
        )
        words = Vocabulary(WORDS.split())
        tokenizer = Tokenizer(words, words, longest=9, at_spaces=at_spaces, lowercase=True)
        loaded = Copier(score, config, tokenizer, {}, None, 1, {})
        monkeypatch.setattr(use, "load", lambda *_: loaded)
        use.use(config)
        said = capsys.readouterr()
        file = tmp_path / "links"
        return said.out, said.err, file.read_text("utf-8").split("\n") if file.exists() else None

    return asked


def test_words_between_spaces_are_counted(ask):
    """The comma and the contraction are words of their own to the translators."""
    text = "Hello, dog's house!\tHello, dog's house!\n\n( dog )\tdog\n"
    assert ask("score", text) == ("-1.0000\n\n-2.0000\n", "", ["0-0 1-1 2-2", "", "0-0", ""])
    # The translation is written without the spaces, and half of its first part is "),".
    out, _, links = ask("translate", "( dog ), \u00ad house\n")
    assert out == "(dog), house\n" and links == ["2-0 4-1", ""]


def test_a_third_column_is_compared(ask):
    told = "translate: alignment error {}; pairs with a gold alignment in the third column: 1.\n"
    text = "hello, dog!\thello, dog!\t0-0 1p1\ndog\tdog\n"
    assert ask("score", text)[1] == told.format("0.0%, precision 100.0%, recall 100.0%")
    text = "hello, dog!\thello, dog!\t1-2 2-1\ndog\tdog\n"
    assert ask("score", text, links_from=1)[1] == told.format("100.0%, precision 0.0%, recall 0.0%")
    text = "hello, dog!\thello, dog!\t1?1\n"
    assert ", recall undefined;" in ask("score", text)[1]
    assert "lines: no link is of position 0, and all would fit" in ask("score", text)[1]


def test_a_third_column_that_is_no_alignment_is_refused(ask, tmp_path):
    with pytest.raises(UsageError) as error:
        ask("score", "dog\tdog\tCC-BY\n")
    assert str(error.value) == (
        f"{tmp_path}/lines: its third column is no alignment, such as 0-0 1-2; 'CC-BY' is there. "
        "Leave the column out."
    )


def test_a_fourth_column_is_refused(ask, tmp_path):
    with pytest.raises(UsageError) as error:
        ask("score", "dog\tdog\ndog\tdog\t0-0\tCC-BY\n")
    assert str(error.value) == (
        f"{tmp_path}/lines: a source, a target and perhaps a gold alignment are read, but a line "
        "has 4 columns. Leave the others out."
    )
    assert ask("score", "dog\tdog\t\t \n")[0] == "-1.0000\n"


def test_a_third_column_of_a_score_without_alignment_is_told(ask):
    _, told, _ = ask("score", "dog\tdog\t0-0\n", "none")
    assert told == (
        "translate: none does not attend, so the gold alignments of the third column are not "
        "used.\n"
    )


def test_a_third_column_with_a_fault_is_refused_before_anything_is_written(ask, tmp_path, capsys):
    with pytest.raises(UsageError) as error:
        ask("score", "dog\tdog\n\ndog dog\tdog\t2-1\n")
    assert str(error.value) == (
        f"{tmp_path}/lines line 3: the alignment links 2 to 1, outside of 2 source and 1 target "
        "tokens counted from 0; counted from 1 all links fit: set --links_from=1."
    )
    assert capsys.readouterr() == ("", "") and not (tmp_path / "links").exists()


def test_at_spaces_every_word_is_counted(ask):
    assert ask("score", "dog ,\tdog ,\n", at_spaces=True)[2] == ["0-0 1-1", ""]

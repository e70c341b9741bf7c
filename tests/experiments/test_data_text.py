"""Tokeniser, vocabulary and written alignments."""

import itertools
import sys
import unicodedata
from subprocess import run

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import EOS, UNK, Vocabulary, detokenize, tokenize
from experiments.data.alignments import is_alignment, parse_alignment, pharaoh
from experiments.data.text import spaced
from experiments.translate.data import Tokenizer


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Two young, White males.", "Two young , White males ."),
        ("I can't; it's they're we'll", "I ca n't ; it 's they 're we 'll"),
        ("Don’t! Wie geht’s?", "Do n’t ! Wie geht ’s ?"),
        ("O'Brien's o'clock", "O'Brien 's o'clock"),
        ("z.B. e.g. U.S. Mr. X", "z.B. e.g. U.S. Mr . X"),
        ("3.5% of 1,000 at 10:30.", "3.5 % of 1,000 at 10:30 ."),
        ("Vor- und Nachteile, T-Shirt - ja", "Vor- und Nachteile , T-Shirt - ja"),
        ("„Grüße“, «oui» “yes”", "„ Grüße “ , « oui » “ yes ”"),
        ("(a/b) [c] wait... so…", "( a / b ) [ c ] wait ... so …"),
        ("I_TURN_RIGHT x_1", "I_TURN_RIGHT x_1"),
        ("नमस्ते दुनिया।", "नमस्ते दुनिया ।"),
        ("e\u0301te\u0301", "été"),
        ("a\u2028b\x0bc\x0cd\x85e\u200bf\x00g", "a b c d e f g"),
        ("Donau\u00addampf\ufeff", "Donaudampf"),
        ("👩\u200d👧 ❤\ufe0f!", "👩\u200d👧 ❤\ufe0f !"),
        ("ꯃꯤꯇꯩ ꯂꯣꯟ", "ꯃꯤꯇꯩ ꯂꯣꯟ"),
        ("ꦧꦱꦗꦮ, ꦲꦏ꧀ꦱꦫ", "ꦧꦱꦗꦮ , ꦲꦏ꧀ꦱꦫ"),
        ("𑄌𑄋𑄴𑄟𑄳𑄦 𑄞𑄌𑄴", "𑄌𑄋𑄴𑄟𑄳𑄦 𑄞𑄌𑄴"),
        ("𞤆𞤵𞤤𞤢𞤪!", "𞤆𞤵𞤤𞤢𞤪 !"),
        ("ၶႅပ်ႉတႆး", "ၶႅပ်ႉတႆး"),
        ("👍🏽🇩🇪🇫🇷 ok", "👍🏽 🇩🇪 🇫🇷 ok"),
        ("👩🏽‍🚀, 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣", "👩🏽‍🚀 , 🏴󠁧󠁢󠁥󠁮󠁧󠁿 1️⃣"),
        ("צה״ל, ג׳ורג׳ בית־ספר", "צה״ל , ג׳ורג׳ בית־ספר"),
        ("col·lecció T\u2011Shirt Հայաստա՞ն ma˥˩", "col·lecció T\u2011Shirt Հայաստա՞ն ma˥˩"),
        ("\u2067שלום\u2069 \u061cمرحبا\u202c!", "שלום مرحبا !"),
        ("٣٫١٤ ١٬٠٠٠ ۱۲:۳۰", "٣٫١٤ ١٬٠٠٠ ۱۲:۳۰"),
        ("(https://a.de/b_c?d=e&f, www.x.org).", "( https://a.de/b_c?d=e&f , www.x.org ) ."),
        ("an me.you+x@mail.x.org.", "an me.you+x@mail.x.org ."),
        ("", ""),
        (" \t ", ""),
    ],
)
def test_tokenize(text, tokens):
    assert tokenize(text) == tuple(tokens.split(" ") if tokens else ())


@pytest.mark.parametrize("category", ["Mn", "Mc", "Me"])
def test_no_mark_of_any_script_cuts_a_word(category):
    marks = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) == category]
    assert len(marks) > 10
    cut = [mark for mark in marks if len(tokenize(f"a{mark}b’s{mark}")) != 1]
    assert not cut


def test_lowercase():
    assert tokenize("Die GRÖSSE, İ", lowercase=True) == ("die", "grösse", ",", "i̇")


@pytest.mark.parametrize(
    "text",
    [
        'She said: "I don\'t know (yet)."',
        "Wie geht's? Er sagte: „Gut“, und ging.",
        "“Yes,” they said, ‘no’.",
        "Vor- und Nachteile: 3.5% von 1,000 (z.B. a/b)!",
        "»So«, «oui».",
        "བོད་སྐད་ནི། ꯃꯩꯇꯩ꯫ አማርኛ።",
        "か\u309a、葛\U000e0100飾、東京。",
        "https://a.de/b_c?d=e, me@mail.x.org",
    ],
)
def test_detokenize_gives_the_text_back(text):
    assert detokenize(tokenize(text)) == text


@pytest.mark.slow
@given(st.text())
def test_tokens_are_clean_and_nothing_visible_is_lost(text):
    tokens = tokenize(text)
    assert all(token and len(token.split()) == 1 for token in tokens)
    for character in text:
        if character.isalnum():
            assert any(part in "".join(tokens) for part in tokenize(character))


@given(st.lists(st.sampled_from(["a", "b.", "'s", '"', "(", ")", "n't", "…", "„", "“", "/"])))
def test_detokenize_keeps_every_token(tokens):
    line, counts = detokenize(tokens), iter(tokens)
    assert line.replace(" ", "") == "".join(tokens)
    parts = ["".join(itertools.islice(counts, count)) for count in spaced(tokens)]
    assert parts == line.split()


@given(st.text(st.sampled_from("aZ1é'’.,-„/日\u0301\u200d\u200b\u00ad \t\x1c\u3000"), max_size=12))
def test_parts_between_spaces_have_the_words_of_the_line(text):
    nothing = Vocabulary([])
    tokenizer = Tokenizer(nothing, nothing, longest=1, at_spaces=False, lowercase=True)
    assert tuple(itertools.chain.from_iterable(tokenizer.parts(text))) == tokenizer.words(text)
    assert len(tokenizer.parts(text)) == len(text.split())


def test_vocabulary_orders_by_count_then_spelling_and_cuts():
    sentences = [("b", "a", "a", "c"), ("b", "d")]
    assert Vocabulary.of_sentences(sentences).words[4:] == ("a", "b", "c", "d")
    assert Vocabulary.of_sentences(sentences, min_count=2).words[4:] == ("a", "b")
    assert Vocabulary.of_sentences(sentences, max_size=3).words[4:] == ("a", "b", "c")
    assert Vocabulary.of_sentences([("x",), ("y", "y")]).words[4:] == ("y", "x")


def test_decode_stops_at_eos_and_shows_other_symbols():
    vocabulary = Vocabulary(["a", "b"])
    assert vocabulary.decode([4, UNK, 0, 1, 5, EOS, 4]) == ("a", "<unk>", "<pad>", "<bos>", "b")
    assert vocabulary.decode([]) == ()


def test_words_spelled_like_special_symbols_cannot_end_a_sentence():
    vocabulary = Vocabulary.of_sentences([("<eos>", "a")])
    assert vocabulary.words == ("<pad>", "<bos>", "<eos>", "<unk>", "a")
    assert vocabulary.encode(["<eos>", "<pad>", "<unk>", "a"]) == [3, 3, 3, 4]


def test_json_round_trip_and_equality():
    vocabulary = Vocabulary(["größe", '"', "\u2028"])
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again == vocabulary and hash(again) == hash(vocabulary)
    assert again != Vocabulary(["größe"])
    assert len(again) == 7 and "größe" in again and "<pad>" not in again
    assert repr(again) == "Vocabulary(7 symbols)"


def test_a_word_listed_twice_is_refused():
    with pytest.raises(ValueError, match=r"^Vocabulary: a word is listed twice; list every word "):
        Vocabulary(["a", "a"])


def test_alignment_notations():
    assert parse_alignment("0-0 1?2 2-1", 3, 3) == ({(0, 0), (2, 1)}, {(0, 0), (2, 1), (1, 2)})
    assert parse_alignment("2 0 1 9", 3, 3)[0] == {(2, 0), (0, 1), (1, 2)}
    assert parse_alignment("2 0 1", 3, 3)[1] == {(2, 0), (0, 1), (1, 2)}
    assert [is_alignment(text) for text in ("0-0 1?2", "3", "CC-BY 2.0", "0-0 x", "")] == [
        *(True, True, False, False, False)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-0 1:1", "has the entry '1:1', which is neither i-j nor i?j or ipj"),
        ("0 1 2 3 4", "has 5 positions for 3 target tokens and the end symbol"),
        ("0-0 2-1", "links 2 to 1, outside of 2 source and 3 target tokens counted from 0"),
        (
            f"0-{5_000 * '1'}",
            f"has the position {40 * '1'}... (5,000 characters), which is in no sentence",
        ),
        ("0-3", "links 0 to 3, outside of 2 source and 3 target tokens counted from 0"),
        ("0 2 1", "links 2 to 1, outside of 2 source and 3 target tokens counted from 0"),
    ],
)
def test_bad_alignments(text, message):
    with pytest.raises(ValueError) as error:
        parse_alignment(text, 2, 3)
    assert str(error.value) == message


@given(st.sets(st.tuples(st.integers(0, 6), st.integers(0, 8))), st.data())
def test_pharaoh_round_trip(possible, data):
    sure = {link for link in possible if data.draw(st.booleans())}
    text = pharaoh(frozenset(sure), frozenset(possible))
    if possible:
        assert is_alignment(text)
        assert parse_alignment(text, 7, 9) == (sure, possible)
    else:
        assert text == ""


def test_importing_the_data_loads_nothing_heavy():
    code = (
        "import sys, experiments.data, experiments.data.load;"
        "print([name for name in ('jax', 'flax', 'numpy', 'scipy', 'sacrebleu')"
        " if name in sys.modules]);"
        "import experiments.significance, experiments.data.batches;"
        "print([name for name in ('jax', 'flax', 'scipy', 'sacrebleu') if name in sys.modules])"
    )
    result = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]

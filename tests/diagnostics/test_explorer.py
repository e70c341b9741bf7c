"""The page of weights: what it holds, what it refuses, and what it does in a browser."""

import base64
import configparser
import html
import json
import re
import shutil
import zlib
from html.parser import HTMLParser
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from attention_jax.base.checks import ShapeError
from attention_jax.diagnostics import Explorer, View, explore

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
NASTY = ["</script>", "<b>&amp;", "\"'", "שלום", "👩🏽‍🚀", "a\nb", "\u2028", "", "\udcff"]


def softmax(*shape, sharpness=4.0):
    x = np.exp(sharpness * np.random.default_rng(0).normal(size=shape))
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


class Elements(HTMLParser):
    """Collects elements with their attributes, and the text of scripts."""

    def __init__(self, page):
        super().__init__()
        self.found, self.scripts, self.open = [], {}, []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "script":
            self.kind = dict(attributes).get("type", "code")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "script":
            self.scripts[self.kind] = self.scripts.get(self.kind, "") + text


def held(page):
    """Return the data of a page, and the weights of each of its views."""
    data = json.loads(Elements(page).scripts["application/json"])
    weights = []
    for view in data["views"]:
        levels, largest = (
            np.frombuffer(zlib.decompress(base64.b64decode(view[name])), kind)
            for name, kind in (("values", np.uint8), ("maxima", "<f4"))
        )
        shape = view["shape"]
        levels = levels.reshape(shape).astype(np.float64)
        weights.append(largest.reshape(*shape[:-1], 1) * (levels / 255) ** 2)
    return data, weights


def test_weights_are_kept_to_a_fraction_of_the_largest_of_their_row():
    given = softmax(2, 3, 5, 7)
    given[1, 1, 2] = 0
    _, (kept,) = held(explore(given, list("abcde"), list("ABCDEFG")).page())
    assert kept.shape == (1, 2, 3, 5, 7)
    error = np.abs(kept[0] - given) / given.max(-1, keepdims=True, initial=1e-30)
    assert error.max() <= 1 / 255
    np.testing.assert_allclose(kept[0].max(-1), given.max(-1), rtol=1e-6)
    assert not kept[0, 1, 1, 2].any()
    _, (many,) = held(
        explore(np.full((1, 4000), 1 / 4000), ["q"], list(map(str, range(4000)))).page()
    )
    np.testing.assert_allclose(many, 1 / 4000, rtol=1e-6)


@pytest.mark.parametrize(
    ("leading", "steps", "kept"),
    [
        ((), (), (1, 1, 1)),
        ((3,), (), (1, 1, 3)),
        ((2, 3), (), (1, 2, 3)),
        ((4,), range(4), (4, 1, 1)),
        ((4, 3), range(4), (4, 1, 3)),
        ((4, 2, 3), range(4), (4, 2, 3)),
    ],
)
def test_layers_heads_and_steps(leading, steps, kept):
    weights = jnp.asarray(softmax(*leading, 2, 5), jnp.bfloat16)
    data, _ = held(explore(weights, "ab", list("abcde"), steps=steps).page())
    (view,) = data["views"]
    assert view["shape"] == [*kept, 2, 5] and view["steps"] == list(map(str, steps))
    assert (len(view["layers"]), len(view["heads"])) == kept[1:]
    assert view["layers"][0] == "layer 0" and view["heads"][-1] == f"head {kept[2] - 1}"


def test_no_text_leaves_its_place():
    count = len(NASTY)
    page = Explorer(
        {"</script>": View(np.eye(count), NASTY, sides=("<i>", "&"))}, '<x> & "y" ü'
    ).page()
    assert page.isascii()
    elements = Elements(page)
    assert not elements.open
    assert sum(tag == "script" for tag, _ in elements.found) == 2
    assert not any(tag in ("b", "i", "x") for tag, _ in elements.found)
    data = json.loads(elements.scripts["application/json"])
    assert data["views"][0]["queries"] == data["views"][0]["keys"] == NASTY
    assert data["views"][0]["sides"] == ["<i>", "&"]
    (section,) = (attributes for tag, attributes in elements.found if tag == "section")
    assert section["aria-label"] == '<x> & "y" ü'


def test_a_page_loads_nothing_and_is_the_same_each_time(tmp_path):
    explorer = explore(softmax(2, 3, 3), "abc")
    page = explorer.save(tmp_path / "new" / "page.html").read_text(encoding="ascii")
    assert page == explorer.page() == explore(softmax(2, 3, 3), "abc").page()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b", page)
    for tag, attributes in Elements(page).found:
        assert tag not in ("link", "iframe", "object", "embed"), tag
        assert not {"src", "href", "srcset"} & attributes.keys(), tag


def test_a_notebook_shows_it_in_a_frame():
    explorer = explore(np.eye(3), "abc", title='"quoted"')
    ((tag, attributes),) = Elements(explorer._repr_html_()).found
    assert tag == "iframe" and attributes["title"] == '"quoted"'
    assert attributes["srcdoc"] == explorer.page()
    assert html.escape(explorer.fragment()) not in explorer._repr_html_()[:100]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (np.ones((2, 2, 2, 2, 2)), "ab"),
            "explore: weights must be [T, S], [N, T, S] or [L, N, T, S], got shape "
            "(2, 2, 2, 2, 2); choose one example of a batch.",
        ),
        (
            (np.ones((2, 3)), "abc"),
            "explore: queries must name each of T = 2 of the weights, got 3.",
        ),
        (
            (np.ones((2, 3)), "ab"),
            "explore: keys must name each of S = 3 of the weights, got 2.",
        ),
        (
            (np.array([[1.0, 0.0], [0.0, -0.5]]), "ab"),
            "explore: weights must be finite and not negative, got -0.5 for query 1 and key 1; "
            "give what `attend` returns as weights.",
        ),
        (
            (np.array([[1.0, np.nan]]), "a", "ab"),
            "explore: weights must be finite and not negative, got nan for query 0 and key 1; "
            "give what `attend` returns as weights.",
        ),
        (
            ([np.ones((1, 2, 2)), np.ones((3, 2, 2))], "ab"),
            "explore: the weights of all steps, layers and heads must have one shape [T, S]; give "
            "those that differ as a view each.",
        ),
        (
            (np.ones((0, 2)), "", "ab"),
            "explore: weights of shape (1, 1, 1, 0, 2) hold nothing to show.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, sentence):
    with pytest.raises(ShapeError, match=f"^{re.escape(sentence)}$"):
        explore(*arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"layers": ("a",)},
            "explore, view 'x': layers must name each of L = 2 of the weights, got 1.",
        ),
        (
            {"gold": [(0, 3)]},
            "explore, view 'x': gold links query 0 to key 3, but there are 3 queries and 3 keys, "
            "counted from 0.",
        ),
        (
            {"steps": (1, 2)},
            "explore, view 'x': keys must name each of S = 3 of the weights, got 2.",
        ),
        (
            {"steps": (1, 2, 3)},
            "explore, view 'x': steps must name each of P = 2 of the weights, got 3.",
        ),
    ],
)
def test_a_view_that_does_not_fit_is_named(options, sentence):
    keys = ["a", "b"] if options.get("steps") == (1, 2) else None
    with pytest.raises(ShapeError, match=f"^{re.escape(sentence)}$"):
        Explorer({"x": View(np.ones((2, 4, 3, 3)), "abc", keys, **options)})


def test_too_many_weights_are_refused_before_anything_is_packed():
    huge = np.broadcast_to(np.float32(0), (2**14 + 1, 2**14))
    few = "at most 268,435,456 weights, got 268,451,840; choose fewer"
    with pytest.raises(ShapeError, match=few):
        explore(huge, range(2**14 + 1), range(2**14))
    with pytest.raises(ShapeError, match="give at least one view, got none"):
        Explorer({})


def test_the_files_of_the_page_are_installed():
    root = Path(__file__).parents[2]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg", encoding="utf-8")
    patterns = setup["options.package_data"]["attention_jax"].split()
    package = root / "attention_jax"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {
        path for path in package.rglob("*") if path.suffix in (".html", ".css", ".js")
    } <= installed


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser, tmp_path):
    """Return a function that opens an explorer; the page may say nothing and load nothing."""
    said = []

    def opened(explorer, **options):
        page = browser.new_page(**options)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text))
        page.on("request", lambda r: r.url.startswith("file:") or said.append(r.url))
        page.goto(explorer.save(tmp_path / "page.html").as_uri())
        page.wait_for_function("/look/.test(document.querySelector('.said').textContent)")
        return page

    yield opened
    assert not said


def sentence(page):
    page.wait_for_timeout(80)  # it is drawn in the next frame
    return re.sub("[\u2068\u2069]", "", page.text_content(".said"))


def marked(page, side):
    """Return the background of each token on one side."""
    spans = "[...document.querySelectorAll('.tokens')[side].children]"
    return page.evaluate(f"side => {spans}.map(span => span.style.background)", side)


@pytest.mark.slow
def test_hover_keys_and_controls_in_a_browser(show):
    """The numbers of the page are those of the weights that were given."""
    weights = np.zeros((2, 2, 2, 3, 4))
    for step, layer, head in np.ndindex(2, 2, 2):
        weights[step, layer, head] = np.eye(3, 4, k=layer) * 0.76 + 0.06
    weights[1, 0, 1, 2] = [0.1, 0.2, 0.3, 0.4]
    view = View(weights, ["ja", "so", NASTY[0]], ["yes", "like", "שלום", "👩🏽‍🚀"], steps=(10, 20))
    page = show(Explorer({"first": view, "second": View(np.eye(2), "ab")}))
    tokens = page.locator(".tokens")
    assert tokens.nth(0).locator(".token").all_text_contents() == ["ja", "so", "</script>"]
    assert page.locator("output").text_content() == "20"

    tokens.nth(0).locator(".token").nth(1).hover()
    assert sentence(page).startswith("so (2 of 3) looks at: like 82%, yes 6%")
    backgrounds = marked(page, 1)
    assert backgrounds[1] != backgrounds[0] == backgrounds[2] != ""
    tokens.nth(1).locator(".token").nth(0).hover()
    assert sentence(page).startswith("yes (1 of 4) is looked at by: ja 82%, so 6%")

    page.select_option(".layers select", "1")
    page.select_option(".heads select", label="mean")
    tokens.nth(0).locator(".token").nth(0).hover()
    assert sentence(page).startswith("ja (1 of 3) looks at: like 82%")
    page.select_option(".layers select", "mean")
    assert "yes 44%, like 44%" in sentence(page)

    page.select_option(".layers select", "0")
    page.select_option(".heads select", "1")
    tokens.nth(0).focus()
    page.keyboard.press("End")
    assert "👩🏽‍🚀 40%, שלום 30%, like 20%, yes 10%" in sentence(page)
    active = tokens.nth(0).get_attribute("aria-activedescendant")
    assert page.locator(f"[id='{active}'][aria-selected=true]").text_content() == "</script>"
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("output").text_content() == "10" and "שלום 82%" in sentence(page)

    tokens.nth(0).focus()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    tokens.nth(1).locator(".token").nth(3).hover()
    assert sentence(page).startswith("ja (1 of 3)"), "a held word stays"
    page.keyboard.press("Escape")
    tokens.nth(1).locator(".token").nth(2).hover()
    assert sentence(page).startswith("שלום (3 of 4)")

    page.click(".swap")
    assert tokens.nth(0).locator(".token").first.text_content() == "yes"
    page.locator(".grid").click(position={"x": 90, "y": 40})
    assert [page.input_value(f".{name} select") for name in ("layers", "heads")] == ["0", "0"]
    page.locator(".grid").focus()
    page.keyboard.press("ArrowDown")
    assert page.input_value(".layers select") == "1"
    page.select_option(".views select", "1")
    page.wait_for_function("document.querySelectorAll('.token').length === 4")
    assert page.is_hidden(".steps") and page.is_hidden(".grid")


@pytest.mark.slow
def test_arrows_follow_the_text_and_hints_its_names(show):
    view = View(np.ones((2, 1, 3, 3)) / 3, ["אחד", "שתיים", "שלוש"], axes=("score", "seed"))
    page = show(Explorer({"": view}))
    assert "one score (row) and seed (column)" in str(page.text_content(".hint"))
    page.locator(".tokens").nth(0).focus()
    page.keyboard.press("ArrowLeft")
    assert sentence(page).startswith("שתיים (2 of 3)"), "the next word is on the left"
    page.keyboard.press("ArrowRight")
    assert sentence(page).startswith("אחד (1 of 3)")


@pytest.mark.slow
def test_thousands_of_tokens_answer_within_a_frame_or_few(show):
    count = 4000
    weights = np.tril(np.ones((count, count), np.float32)) / np.arange(1, count + 1)[:, None]
    page = show(explore(weights[None], [f"w{i}" for i in range(count)]))
    script = """async () => {
      const spans = document.querySelectorAll('.tokens')[0].children, spent = [];
      for (const at of [3999, 10, 2000, 3998, 1, 3000, 500]) {
        const start = performance.now();
        spans[at].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}));
        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
        spent.push(performance.now() - start);
      }
      return spent.sort((a, b) => a - b)[3];
    }"""
    # A frozen page takes seconds; the bound is wide for a machine that does other work too.
    assert page.evaluate(script) < 500
    assert sentence(page).startswith("w500 (501 of 4000) looks at: w0 0.2%")


@pytest.mark.slow
def test_paper_is_light_and_has_no_controls(show):
    page = show(explore(np.eye(3)[None], "abc"), color_scheme="dark")
    dark = marked(page, 1)
    page.emulate_media(media="print")
    page.wait_for_timeout(100)
    assert marked(page, 1) != dark
    assert page.is_hidden(".controls") and page.is_hidden(".hint") and page.is_visible(".state")
    assert "8 81 156" in " ".join(marked(page, 1)).replace(",", ""), "the colour of light pages"


@pytest.mark.slow
def test_a_frame_is_as_high_as_its_page(browser):
    page = browser.new_page()
    page.set_content(explore(np.eye(3)[None], "abc")._repr_html_())
    frame = page.frame_locator("iframe")
    frame.locator(".token").nth(2).hover()
    page.wait_for_timeout(200)
    assert "c" in frame.locator(".said").text_content()
    inner = frame.locator("html").evaluate("element => element.scrollHeight")
    assert abs(page.locator("iframe").evaluate("f => f.clientHeight") - inner) <= 8

"""The page and the pictures say what the explanation says, offline and in every script."""

import json
import re
import shutil
import zlib
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.image import imread

from graftlm import Connection, Explanation, attention_picture
from graftlm.attention_page import attention_page
from graftlm.attention_picture import (
    draw_attention,
    draw_update_share,
    drawable,
    fonts_for,
    shortened,
)
from graftlm.cli.attention import show_changes
from graftlm.cli.show import output

CHROMIUM = shutil.which("chromium")
TOKENS = ["سل", "ام", " e", "\u0301", "</script>", "$a$", "狐", "\n", "", "a long text of 25 chars"]


def explanation(num_tokens: int = 10, num_keys: int = 7) -> Explanation:
    """One of random numbers; two connections, three heads."""
    random = np.random.default_rng(0)
    tokens = (TOKENS * (num_tokens // len(TOKENS) + 1))[:num_tokens]
    weights = random.dirichlet(np.ones(num_keys), (2, 3, num_tokens)).astype(np.float32)
    return Explanation(
        tokens=tokens,
        num_prompt=num_tokens - 3,
        connections=[
            Connection(augmenting="other", augmenting_layer=k, anchor_layer=k + 1) for k in (0, 2)
        ],
        scales={"other": 1.0},
        augmenting_tokens={"other": [f"k{n}" for n in range(num_keys - 1)] + ["العا"]},
        branches={"other": [0] * (num_keys - 1) + [2]},
        attention=list(weights),
        update_share=random.random((2, num_tokens), dtype=np.float32),
        next_tokens={
            part: [[("ام", 0.5), ("\u0301", 0.25)]] * num_tokens
            for part in ("composed", "anchor", "other")
        },
        divergence=random.random(num_tokens, dtype=np.float32),
    )


class Page(HTMLParser):
    """What a page loads, and the data it holds."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.data: Any = None
        self.in_data = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.loads += [str(values[name]) for name in ("src", "href") if name in values]
        self.in_data = values.get("id") == "data"

    def handle_data(self, data: str) -> None:
        if self.in_data:
            self.data, self.in_data = json.loads(data), False


def test_the_page_holds_everything_and_loads_nothing() -> None:
    shown = explanation()
    text = attention_page(shown)
    page = Page(text)
    assert page.loads == []
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.data["tokens"] == shown.tokens
    assert page.data["labels"]["anchor"][:4] == ["سل\u200d", "\u200dام", "␣e", "◌\u0301"]
    assert page.data["next_tokens"]["anchor"][0] == [["ام", 0.5], ["\u0301", 0.25]]
    for weights, packed in zip(shown.attention, page.data["attention"], strict=True):
        steps = np.frombuffer(zlib.decompress(b64decode(packed["bytes"])), dtype=np.uint8)
        unpacked = (steps.reshape(packed["shape"]) / 255) ** 2
        assert np.abs(np.sqrt(unpacked) - np.sqrt(weights)).max() <= 1 / 510 + 1e-6


@pytest.fixture(scope="module")
def browser() -> Any:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser: Any, folder: Path, shown: Explanation, width: int = 1000) -> tuple[Any, list]:
    """The page as a browser shows it, and what went wrong there or went out to the network."""
    place = folder / "page.html"
    place.write_text(attention_page(shown), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 700})
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text))
    page.on("request", lambda r: None if r.url == place.as_uri() else troubles.append(r.url))
    page.goto(place.as_uri())
    # By a selector: the page's own policy lets nobody, not even a test, evaluate again and again.
    page.wait_for_selector("#canvas[aria-label*='mean over heads']")
    return page, troubles


@pytest.mark.slow
def test_a_browser_shows_the_numbers(browser, tmp_path):
    """By keyboard: the token it starts with, the next ones, a head, a connection and a cell."""
    shown = explanation()
    page, troubles = opened(browser, tmp_path, shown)
    start = int(shown.divergence.argmax())
    selected = "document.querySelector('#text [aria-selected=true]').dataset.token"
    assert page.evaluate(selected) == str(start)
    page.focus(f"#text [data-token='{start}']")
    page.keyboard.press("Home")
    assert page.evaluate(selected) == "0"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(selected) == "1"
    assert "2 of 10" in page.inner_text("#place")
    best = int(shown.attention[0].mean(0)[1, :6].argmax())
    assert f"k{best}" in page.inner_text("#most")
    page.select_option("#head", "2")
    page.select_option("#connection", "1")
    assert page.inner_text("#head option:first-child + option") == "head 0 (of 0 to 2)"
    page.wait_for_selector(
        "#canvas[aria-label*='layer 2 → anchor layer 3, head 2 (of 0 to 2), 10 by 7']"
    )
    found = np.array(page.evaluate("Array.from(view.weights)")).reshape(10, 7)
    assert np.abs(found - shown.attention[1][2]).max() < 0.005
    share = f"{100 * shown.update_share[1][1]:.1f} %"
    assert share in page.inner_text("#most")
    page.focus("#canvas")
    page.keyboard.press("ArrowRight")
    told = page.inner_text("#live")
    assert "reads “k1”" in told
    assert f"{100 * found[1, 1]:.1f} %" in told
    assert troubles == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_more_weight_is_a_stronger_colour_in_light_and_dark(browser, tmp_path, scheme):
    """On the page's colour a small weight was weaker than none, and the strongest "darkest"."""
    weights = np.zeros((3, 10, 7), np.float32)
    weights[:, 4] = np.array([0, 0.001, 0.01, 0.1, 0.2, 0.3, 0.4])
    page, _ = opened(browser, tmp_path, replace(explanation(), attention=[weights] * 2))
    page.emulate_media(color_scheme=scheme)
    page.evaluate("draw()")
    colors = page.evaluate(
        """() => [...Array(7).keys()].map((k) => {
          const {left, top} = edge(), place = [left + k * cell + 10, top + 4 * cell + 10];
          return Array.from(canvas.getContext("2d").getImageData(...place, 1, 1).data).slice(0, 3);
        })"""
    )
    panel = {"light": [0xF6, 0xF8, 0xFA], "dark": [0x1C, 0x22, 0x28]}[scheme]
    assert colors[0] == panel
    distances = [np.abs(np.subtract(color, panel)).sum() for color in colors]
    assert distances == sorted(set(distances))
    assert "The stronger the colour, the more is read" in page.inner_text("#scale")


@pytest.mark.slow
def test_only_what_is_wider_than_its_column_is_turned(browser, tmp_path):
    """A "<" turned by a quarter is a "V"."""
    tokens = ["<", "-", "->", "(", "a word", "[EOS]", "7"]
    shown = replace(explanation(), augmenting_tokens={"other": tokens}, branches={"other": [0] * 7})
    page, troubles = opened(browser, tmp_path, shown)
    turned = page.evaluate(
        """() => {
          const pen = canvas.getContext("2d"), {rotate, fillText} = pen, found = [];
          let isTurned = false;
          pen.rotate = (angle) => { isTurned = true; rotate.call(pen, angle); };
          pen.fillText = (text, ...place) => {
            if (isTurned) found.push(text);
            isTurned = false;
            fillText.call(pen, text, ...place);
          };
          draw();
          return found;
        }"""
    )
    assert turned == ["a␣word", "[EOS]"]
    assert troubles == []


@pytest.mark.slow
def test_connections_are_told_apart_where_a_narrow_window_cuts_them(browser, tmp_path):
    shown = explanation()
    long = "a_model_of_a_long_name"
    shown = replace(
        shown,
        connections=[replace(c, augmenting=long) for c in shown.connections],
        scales={long: 1.0},
        augmenting_tokens={long: shown.augmenting_tokens["other"]},
        branches={long: shown.branches["other"]},
    )
    page, troubles = opened(browser, tmp_path, shown, 320)
    options = page.inner_text("#connection").splitlines()
    assert [option[:15] for option in options] == ["layers 0 → 1: a", "layers 2 → 3: a"]
    room = page.evaluate(
        """() => {
          const select = document.getElementById("connection"), pen = canvas.getContext("2d");
          pen.font = getComputedStyle(select).font;
          return select.clientWidth - 40 - pen.measureText("layers 0 → 1").width;
        }"""
    )
    assert room > 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert troubles == []


@pytest.mark.slow
def test_no_token_has_a_probability_of_0_or_1(browser, tmp_path):
    """Rounded to 6 digits some are; softmax gives neither."""
    places = [[("yes", 1.0), ("perhaps", 0.25), ("hardly", 2e-6), ("no", 0.0)]] * 10
    shown = replace(explanation(), next_tokens={"composed": places, "anchor": places})
    page, troubles = opened(browser, tmp_path, shown)
    numbers = page.eval_on_selector_all("#next td", "(all) => all.map((td) => td.textContent)")
    assert numbers == ["> 99.9 %", "25.0 %", "< 0.01 %", "< 0.01 %"] * 2
    assert "“yes” (> 99.9 %)" in page.inner_text("#changes")
    assert troubles == []


@pytest.mark.slow
def test_letters_join_and_marks_stay_on_them(browser, tmp_path):
    """Tokens side by side take the room that their text takes as a whole."""
    shown = replace(
        explanation(), tokens=["سل", "ام", " e", "\u0301", " नम", "स्", "ते", "", "t", "x"]
    )
    page, _ = opened(browser, tmp_path, shown)
    widths = page.evaluate(
        """() => {
          const box = document.getElementById("text"), whole = document.createElement("span");
          const pieces = Array.from(box.children);
          const left = Math.min(...pieces.map((p) => p.getBoundingClientRect().left));
          const right = Math.max(...pieces.map((p) => p.getBoundingClientRect().right));
          whole.textContent = data.tokens.join("");
          box.replaceChildren(whole);
          return [right - left, whole.getBoundingClientRect().width];
        }"""
    )
    assert widths[0] == pytest.approx(widths[1], abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1000])
def test_long_texts_scroll_and_phones_need_no_sideways_scrolling(browser, tmp_path, width):
    page, troubles = opened(browser, tmp_path, explanation(600, 400), width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("map.scrollWidth") > 400 * 20
    assert page.evaluate("canvas.width") <= width * page.evaluate("devicePixelRatio")
    page.evaluate("map.scrollTop = 5000")
    page.focus("#canvas")
    page.keyboard.press("ArrowDown")
    row = page.evaluate("state.row")
    inside = page.evaluate("state.row * cell >= map.scrollTop")
    assert row > 0
    assert inside
    assert troubles == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1000])
def test_the_map_follows_the_chosen_token(browser, tmp_path, width):
    """It stood at its top left, whichever token was chosen; the reader's own scrolling stays."""
    shown = explanation(200, 150)
    shown.divergence[:] = np.arange(200) == 120
    page, troubles = opened(browser, tmp_path, shown, width)
    place = """() => [state.token * cell - map.scrollTop, canvas.clientHeight - edge().top - cell,
        view.weights.subarray(state.token * view.columns, (state.token + 1) * view.columns)
          .reduce((best, weight, k, all) => weight > all[best] ? k : best, 0) * cell
          - map.scrollLeft, canvas.clientWidth - edge().left - cell]"""
    page.focus("#text [data-token='120']")
    for key, token in ((None, 120), ("Home", 0), ("End", 199), ("ArrowUp", 198)):
        if key:
            page.keyboard.press(key)
        assert page.evaluate("state.token") == token
        top, highest, left, widest = page.evaluate(place)
        assert 0 <= top <= highest
        assert 0 <= left <= widest
    page.evaluate("map.scrollLeft = 300")
    page.click("#canvas", position={"x": 200, "y": 300})
    assert page.evaluate("map.scrollLeft") == 300
    assert troubles == []


@pytest.mark.slow
def test_a_switched_off_model_is_named(browser, tmp_path):
    shown = replace(
        explanation(), scales={"other": 0.0}, attention=[np.zeros((3, 10, 7), np.float32)] * 2
    )
    page, troubles = opened(browser, tmp_path, shown)
    assert "other is switched off (scale 0)" in page.inner_text("#notices")
    assert "reads nothing" in page.inner_text("#most")
    assert troubles == []


def test_nothing_to_read_and_nothing_changed_make_a_page_and_pictures(tmp_path) -> None:
    """An augmenting model that has read no token yet, and a fresh composition."""
    shown = replace(
        explanation(),
        augmenting_tokens={"other": []},
        branches={"other": []},
        attention=[np.zeros((3, 10, 0), np.float32)] * 2,
        update_share=np.zeros((2, 10), np.float32),
        divergence=np.zeros(10, np.float32),
    )
    assert Page(attention_page(shown)).data["attention"][0]["shape"] == [3, 10, 0]
    draw_attention(shown, tmp_path / "a.png")
    draw_update_share(shown, tmp_path / "u.png")


def test_the_terminal_says_where_composition_changes_something_or_nowhere(capsys) -> None:
    """A fresh composition had eight rows of 0.0000."""
    shown = replace(explanation(), divergence=np.zeros(10, np.float32))
    shown.divergence[0] = 1e-9  # what two kernels may differ by
    show_changes(output(), shown)
    assert capsys.readouterr().out.splitlines() == [
        "Where composition changes what comes next",
        *("Nowhere: the composed model is the anchor here.", ""),
    ]
    shown.divergence[2:4] = 0.25, 0.00001
    show_changes(output(), shown)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:3] for row in rows[:2]] == [["3", "␣e", "0.2500"], ["4", "◌\u0301", "<"]]
    assert rows[2:] == [[]]


# ---- pictures ----------------------------------------------------------------------------


def test_pictures_are_drawn_without_a_warning(tmp_path: Path) -> None:
    """Arabic, marks, dollars that are no formula, and a character that no font here may have."""
    shown = explanation()
    for name, options in {
        "all.png": {},
        "one.png": {"connection": 1, "head": 2},
    }.items():
        draw_attention(shown, tmp_path / name, **options)
    draw_update_share(shown, tmp_path / "updates.png")
    sizes = {path.name: imread(path).shape for path in tmp_path.iterdir()}
    assert sorted(sizes) == ["all.png", "one.png", "updates.png"]
    assert sizes["all.png"][1] > 1.5 * sizes["one.png"][1]  # both connections, side by side


def test_a_picture_shows_the_weights(tmp_path: Path) -> None:
    """A single weight of 1 is the only cell in the fullest colour, where it belongs."""
    weights = np.zeros((3, 10, 7), np.float32)
    weights[1, 2, 3] = 1.0
    shown = replace(explanation(), attention=[weights] * 2)
    draw_attention(shown, tmp_path / "one.png", connection=0, head=1)
    draw_attention(shown, tmp_path / "none.png", connection=0, head=2)
    one, none = (imread(tmp_path / name)[..., :3] for name in ("one.png", "none.png"))
    full = np.array([0x1F, 0x6F, 0x8B]) / 255
    is_full = [
        np.abs(image[:, : image.shape[1] * 3 // 4] - full).max(-1) < 0.01 for image in (one, none)
    ]
    assert is_full[0].sum() > 300
    assert is_full[1].sum() == 0


def test_heads_count_from_0_as_layers_do(figures: list[Any]) -> None:
    draw_attention(explanation(), "a.png", connection=1, head=2)
    title = figures[0].axes[0].get_title(loc="left")
    assert title == "other: layer 2 → anchor layer 3\nhead 2 (of 0 to 2)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connection": 2}, "connection is 2, but there are connections 0 to 1"),
        ({"connection": -1}, "connection is -1, but there are connections 0 to 1"),
        ({"head": 3}, "head is 3, but each connection has heads 0 to 2"),
    ],
)
def test_what_is_not_there_is_not_drawn(options, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        draw_attention(explanation(), tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def only_dejavu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no font but matplotlib's own."""
    only = [f for f in font_manager.fontManager.ttflist if f.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", only)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is saved, instead of files, as matplotlib lays it out."""
    kept: list[Any] = []

    def lay_out(figure: Any, path: Any) -> None:
        figure.draw_without_rendering()
        kept.append(figure)

    monkeypatch.setattr(attention_picture, "save", lay_out)
    return kept


@pytest.mark.usefixtures("only_dejavu")
def test_characters_without_a_glyph_are_numbers() -> None:
    fonts = fonts_for(["ab狐c"])
    assert list(fonts) == ["DejaVu Sans"]
    assert drawable("ab狐c", fonts) == "abU+72D0 c"
    assert drawable("سل\u200d", fonts) in ("سل\u200d", "سل")


THAI, HINDI = "สวัสดีครับผมชื่อ", "नमस्तेदुनियाकैसे"


@pytest.mark.usefixtures("only_dejavu")
def test_long_labels_are_cut_as_they_are_drawn() -> None:
    """They were cut to 16 characters first, of which each then became seven."""
    fonts = fonts_for([THAI, HINDI])
    assert shortened(THAI, fonts) == "U+0E2A U+0E27…"
    assert shortened(HINDI, fonts) == "U+0928 U+092E…"
    assert shortened("狐狸", fonts) == "U+72D0 U+72F8"
    assert shortened("a text of 16 chs", fonts) == "a text of 16 chs"
    assert shortened("a text of 17 chrs", fonts) == "a text of 17 ch…"
    assert shortened("a text of 17 che\u0301s", fonts) == "a text of 17 ch…"
    assert shortened("a text of 17 ce\u0301rs", fonts) == "a text of 17 c…"
    assert shortened("e" + "\u0301" * 20, fonts) == "e…"


def words(axis: Any) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


def assert_all_is_inside(figures: list[Any]) -> None:
    """Each panel has room to be seen, and nothing written around it is cut."""
    for figure in figures:
        page = figure.bbox
        for axes in (axes for axes in figure.axes if axes.get_visible()):
            assert axes.bbox.height > 40
            box = axes.get_tightbbox(for_layout_only=False)
            assert box.x0 >= page.x0 - 1
            assert box.y0 >= page.y0 - 1
            assert box.x1 <= page.x1 + 1
            assert box.y1 <= page.y1 + 1


@pytest.mark.usefixtures("only_dejavu")
def test_long_tokens_leave_the_pictures_whole(figures: list[Any]) -> None:
    """Labels took all the room: matplotlib warned, and cut titles and all but a label's end."""
    tokens = [THAI, THAI + "x", HINDI, "狐狸" * 9, *explanation().tokens[4:]]
    shown = replace(explanation(), tokens=tokens, augmenting_tokens={"other": tokens[:7]})
    draw_attention(shown, "a.png", connection=0)
    draw_attention(shown, "all.png")
    draw_update_share(shown, "u.png")
    assert words(figures[0].axes[0].yaxis)[:4] == [
        *("1: U+0E2A U+0E27…", "2: U+0E2A U+0E27…", "3: U+0928 U+092E…", "4: U+72D0 U+72F8…"),
    ]
    assert figures[0].axes[0].get_ylabel() == "anchor tokens, numbered"
    assert_all_is_inside(figures)


def test_titles_wider_than_a_small_heatmap_leave_it_whole(figures: list[Any]) -> None:
    name = "a_model_of_a_name_that_is_wider_than_a_heatmap_of_few_tokens"
    shown = replace(
        explanation(2, 1),
        tokens=["twenty characters, a", "twenty characters, b"],  # cut alike, so numbered
        num_prompt=2,
        connections=[
            Connection(augmenting=name, augmenting_layer=k, anchor_layer=20) for k in (10, 12)
        ],
        scales={name: 0.0},
        augmenting_tokens={name: ["a"]},
        branches={name: [0]},
    )
    draw_attention(shown, "a.png", connection=0)
    draw_update_share(shown, "u.png")
    assert_all_is_inside(figures)


@pytest.mark.slow
def test_a_long_texts_labels_have_numbers(figures: list[Any]) -> None:
    """Only some had a label, which looked as if those were all."""
    tokens: list[str] = ["<", "a", "b", "c", "d", ">", "+"] * 80
    draw_update_share(replace(explanation(560), tokens=tokens), "u.png")
    axis = figures[0].axes[-1].xaxis
    assert words(axis)[:3] == ["1: <", "8: <", "15: <"]
    assert axis.get_label_text() == "anchor tokens, one in 7 labelled, with its number"
    draw_update_share(replace(explanation(80), tokens=tokens[:80]), "u.png")
    axis = figures[1].axes[-1].xaxis
    assert words(axis) == tokens[:80]
    assert axis.get_label_text() == "anchor tokens"


def test_labels_that_fit_into_their_column_are_not_turned(figures: list[Any]) -> None:
    """A "<" turned by a quarter is a "V"."""
    tokens = ["<", "-", "->", "(", "a word", "[EOS]", "7"]
    draw_attention(replace(explanation(), augmenting_tokens={"other": tokens}), "a.png")
    for axes in figures[0].axes[:2]:
        labels = axes.xaxis.get_ticklabels()
        turned = [label.get_text() for label in labels if label.get_rotation()]
        assert turned == ["a␣word", "[EOS]"]

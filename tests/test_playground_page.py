"""The playground's page, in a browser."""

import asyncio
import gc
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from graftlm.cli.playground import free_port
from graftlm.playground.runs import Playground, Request
from playgrounds import LIMITS, composed, wait_until, written
from tiny import character_tokenizer

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return composed(tmp_path_factory.mktemp("models"))


in_browser = [
    pytest.mark.slow,
    # Gradio's own statistics, in its own thread.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
    # Gradio leaves event loops behind, each with two sockets, whenever it builds a page.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; run make browser"),
]


@pytest.fixture(scope="module", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """What Gradio leaves is collected here; other tests would have to answer for it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.set_event_loop(None)
        gc.collect()


NO_NETWORK = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESKTOP, PHONE = (1440, 900), (390, 844)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=NO_NETWORK.split())
        yield started
        started.close()


@contextmanager
def serving(playground: Playground, title: str) -> Iterator[str]:
    """The page of a playground; its address."""
    from graftlm.playground.page import Page
    from graftlm.playground.serving import serve

    # Each test process has ports of its own: two would find the same one free.
    first = 8200 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    port = free_port("127.0.0.1", range(first, first + 100))
    with serve(Page(playground, title), "127.0.0.1", port) as address:
        yield address


@pytest.fixture(scope="module")
def served(model: Any) -> Iterator[tuple[Playground, str]]:
    playground = Playground(model, character_tokenizer(), LIMITS)
    with serving(playground, "<b>composed</b>") as address:
        yield playground, address


class Visitor:
    """Someone who uses the page in a window of their own."""

    def __init__(
        self, browser: Any, address: str, size: tuple[int, int] = DESKTOP, scheme: str = "light"
    ):
        viewport = {"width": size[0], "height": size[1]}
        self.window = browser.new_context(viewport=viewport, color_scheme=scheme)
        self.page = self.window.new_page()
        self.addresses: list[str] = []
        self.problems: list[str] = []
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        self.page.get_by_label("Prompt").wait_for()

    def set(self, label: str, value: float) -> None:
        """Write a number into a field, until it stays: Gradio resets one that it has just shown."""
        field = self.page.locator(f"input[type=number][aria-label*='{label}']")
        for _ in range(20):
            field.fill(str(value))
            field.press("Tab")
            self.page.wait_for_timeout(200)
            if field.input_value() == str(value):
                return
        raise AssertionError(f"{label} does not stay at {value}")

    def generate(self, prompt: str, new_tokens: int = 40) -> None:
        if not self.page.get_by_label("number input for New tokens").is_visible():
            self.page.get_by_role("button", name="Sampling and length").click()
        self.set("New tokens", new_tokens)
        self.page.get_by_label("Completion").check()
        self.page.get_by_label("Prompt").fill(prompt)
        self.page.get_by_role("button", name="Generate").click()

    def status(self, words: str) -> None:
        """Wait until the status says so."""
        self.page.locator("#status", has_text=words).wait_for(timeout=60_000)

    def texts(self) -> dict[str, str]:
        labels = {"anchor": "anchor alone", "code": "code alone", "composed": "composed: "}
        fields = {name: self.page.get_by_label(label) for name, label in labels.items()}
        return {name: field.input_value(timeout=5000) for name, field in fields.items()}


def expected(playground: Playground, prompt: str, scale: float, count: int = 40) -> dict[str, str]:
    request = Request(prompt=prompt, max_new_tokens=count, scales={"code": scale})
    return written(playground.start("nobody", request))


@pytest.fixture
def visit(browser: Any, served: tuple[Playground, str]) -> Iterator[Any]:
    visitors: list[Visitor] = []

    def enter(*args: Any) -> Visitor:
        visitors.append(Visitor(browser, served[1], *args))
        return visitors[-1]

    yield enter
    for visitor in visitors:
        assert visitor.problems == []
        visitor.window.close()


class TestInTheBrowser:
    pytestmark = in_browser

    def test_three_texts_stream_side_by_side(self, visit: Any, served: Any) -> None:
        visitor, playground = visit(), served[0]
        places = [visitor.page.locator(f"#{name}") for name in ("columns", "attention", "composed")]
        boxes = [place.bounding_box() for place in places]
        visitor.page.get_by_label("Prompt").fill("1+2=")
        visitor.page.get_by_label("Completion").check()
        visitor.page.get_by_label("Prompt").press("Shift+Enter")
        seen = set()
        for _ in range(600):
            seen.add(tuple(map(len, visitor.texts().values())))
            if visitor.page.locator("#status", has_text="Done.").count():
                break
            assert [place.bounding_box() for place in places] == boxes  # nothing jumps
        visitor.status("Done.")
        assert visitor.texts() == expected(playground, "1+2=", 1, 64)
        # Before the first is ready, all three have begun, and were seen about equally far; not at
        # every look, because a busy machine may show one column later than another.
        ends = [len(text) for text in visitor.texts().values()]
        between = [
            lengths
            for lengths in seen
            if all(0 < n < end for n, end in zip(lengths, ends, strict=True))
        ]
        assert any(max(lengths) - min(lengths) <= 8 for lengths in between)
        assert [place.bounding_box() for place in places] == boxes
        for note in visitor.page.locator(".note div[aria-live]").all():
            assert re.fullmatch(r"64 tokens · first after [\d.]+ m?s · then .* tokens/s",
                                note.inner_text())  # fmt: skip
        assert {a.split("/")[2] for a in visitor.addresses if a.startswith("http")} == {
            served[1].removeprefix("http://")
        }
        assert visitor.page.get_by_role("heading").first.inner_text() == "<b>composed</b>"

    def test_the_slider_at_0_gives_the_anchors_exact_text(self, visit: Any, served: Any) -> None:
        visitor, playground = visit(), served[0]
        slider = visitor.page.get_by_label("range slider for Scale of code")
        slider.focus()
        slider.press("Home")
        visitor.generate("abc")
        visitor.status("Done.")
        texts = visitor.texts()
        assert texts == expected(playground, "abc", 0)
        assert texts["composed"] == texts["anchor"] != expected(playground, "abc", 1)["composed"]
        visitor.set("Scale of code", 1)
        visitor.page.get_by_label("Read code").uncheck()
        visitor.generate("abc")
        visitor.status("Writing")
        visitor.status("Done.")
        assert visitor.texts() == texts

    def test_two_visitors_at_once(self, visit: Any, served: Any) -> None:
        playground, scales, count = served[0], (0.5, 1.5), 150
        visitors = [visit(), visit(PHONE)]
        for visitor, scale in zip(visitors, scales, strict=True):
            visitor.set("Scale of code", scale)
        for visitor in visitors:
            visitor.generate("abc", count)
        for visitor in visitors:
            visitor.status("Writing")
        for visitor in visitors:
            visitor.status("Done.")
        found = [visitor.texts() for visitor in visitors]
        assert found == [expected(playground, "abc", scale, count) for scale in scales]
        assert found[0]["composed"] != found[1]["composed"]
        assert found[0]["anchor"] == found[1]["anchor"]

    def test_the_heatmap_opens(self, visit: Any) -> None:
        visitor = visit()
        visitor.page.get_by_role("button", name="Attention of the bridges").click()
        show = visitor.page.get_by_role("button", name="Show the attention of the last run")
        show.click()
        alarm = visitor.page.locator("#attention").get_by_role("alert")
        alarm.wait_for()
        assert alarm.inner_text() == "Nothing has been written yet; press Generate first."
        visitor.generate("1+2=</script>{{a}}${b}", 5)
        visitor.status("Done.")
        show.click()
        frame = visitor.page.frame_locator("iframe[title='Attention of the bridges']")
        frame.get_by_text("22 tokens of a prompt, and 5 the composed model wrote").wait_for()
        assert frame.get_by_text("code: layer 1").count()

    def test_attention_never_stands_below_other_texts(self, visit: Any) -> None:
        """It stayed when other texts were written, and as it was when it was asked for early."""
        visitor = visit()
        visitor.page.get_by_role("button", name="Attention of the bridges").click()
        show = visitor.page.get_by_role("button", name="Show the attention of the last run")
        frame = visitor.page.locator("iframe[title='Attention of the bridges']")
        told = visitor.page.get_by_text("Press the button to see who reads what in the last run.")
        unfinished = visitor.page.get_by_text("The text as far as it was written; press the button")
        told.wait_for()
        visitor.generate("1+2=", 5)
        visitor.status("Done.")
        show.click()
        frame.wait_for()
        assert not told.count()
        assert not unfinished.count()
        visitor.generate("abc", 3000)
        told.wait_for()
        assert not frame.count()
        visitor.status("Writing")
        show.click()
        unfinished.wait_for()
        assert frame.count()
        visitor.page.get_by_role("button", name="Stop").click()
        visitor.status("Stopped.")
        visitor.generate(" ")
        visitor.status("The prompt is empty")
        assert frame.count()  # of the texts that the page still shows

    def test_attention_that_comes_too_late(
        self, served: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Another run may begin while it is computed."""
        from graftlm.playground.page import Page

        playground, page = served[0], Page(served[0], "composed")
        visitor: Any = SimpleNamespace(session_hash="late")
        written(playground.start("late", Request(prompt="a", max_new_tokens=2)))
        compute = playground.explain

        def slowly(name: str) -> Any:
            found = compute(name)
            written(playground.start(name, Request(prompt="b", max_new_tokens=2)))
            return found

        monkeypatch.setattr(playground, "explain", slowly)
        assert "iframe" not in page.on_show(visitor)
        monkeypatch.undo()
        assert "iframe" in page.on_show(visitor)

    def test_on_a_phone_the_texts_follow_the_prompt(self, visit: Any) -> None:
        """They stood below all settings."""
        visitor = visit(PHONE)
        places = ("#actions", "#anchor", "#composed", "#settings", "#attention")
        tops = [visitor.page.locator(place).bounding_box()["y"] for place in places]
        assert tops == sorted(tops)
        assert tops[1] - tops[0] < 150

    def test_stop_and_leaving_end_the_writing(self, visit: Any, served: Any) -> None:
        visitor, playground = visit(), served[0]
        visitor.generate("abc", 3000)
        visitor.status("Writing")
        visitor.page.get_by_role("button", name="Stop").click()
        visitor.status("Stopped.")
        assert all(0 < len(text) < 3000 for text in visitor.texts().values())
        visitor.generate("abc", 3000)
        visitor.status("Writing")
        (run,) = [run for run in playground.runs.values() if not run.is_over]
        visitor.page.close()
        wait_until(lambda: run.is_over)
        assert run.stopping.is_set()
        wait_until(lambda: run not in playground.runs.values())

    def test_errors_are_a_sentence_and_pass(self, visit: Any, served: Any) -> None:
        visitor = visit()
        visitor.generate("x" * 41)
        words = "The prompt has 41 characters, but this page takes up to 40; shorten it."
        visitor.status(words)
        assert visitor.page.get_by_role("alert").inner_text() == words
        visitor.generate(" ")
        visitor.status("The prompt is empty, so there is nothing to continue; write one.")
        visitor.page.get_by_label("Seed").fill("")
        visitor.generate("abc")
        visitor.status("A setting is empty; write a number into it.")
        visitor.page.get_by_label("Seed").fill("2.5")
        visitor.generate("abc")
        visitor.status("Seed is 2.5, but must be a whole number; write 2 or 3.")
        visitor.page.get_by_label("Seed").fill("3")
        visitor.set("Top-k", 2.5)
        visitor.generate("abc")
        visitor.status("Top-k is 2.5, but must be a whole number; write 2 or 3.")
        visitor.set("Top-k", 2)
        visitor.generate("abc")
        visitor.status("Done.")
        assert visitor.texts() == expected(served[0], "abc", 1)

    @pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_fits_and_can_be_read(
        self, visit: Any, size: tuple[int, int], scheme: str, tmp_path: Path
    ) -> None:
        visitor = visit(size, scheme)
        visitor.generate("abc", 5)
        visitor.status("Done.")
        assert visitor.page.evaluate("document.documentElement.scrollWidth") == size[0]
        for place in ("#about p", "#status div", ".note div", "#scale-code", "#generate"):
            assert contrast(visitor.page, place) >= 4.5, place
        is_dark = luminance(visitor.page.evaluate(BACKGROUND, "#status")) < 0.5
        assert is_dark == (scheme == "dark")

    def test_no_chat_without_a_template(self, browser: Any, model: Any) -> None:
        playground = Playground(model, character_tokenizer(chat_template=None), LIMITS)
        with serving(playground, "composed") as address:
            visitor = Visitor(browser, address)
            assert visitor.page.get_by_label("Chat").is_disabled()
            assert visitor.page.get_by_label("Completion").is_checked()
            told = "No chat: the anchor's tokenizer has no chat template."
            assert visitor.page.get_by_text(told).is_visible()
            visitor.window.close()


COLOR = "place => getComputedStyle(document.querySelector(place)).color"
BACKGROUND = """place => {
    for (let e = document.querySelector(place); e; e = e.parentElement) {
        const color = getComputedStyle(e).backgroundColor;
        if (color !== "rgba(0, 0, 0, 0)" && color !== "transparent") return color;
    }
    return "rgb(255, 255, 255)";
}"""


def luminance(color: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    channels = [int(float(value)) / 255 for value in re.findall(r"[\d.]+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(page: Any, place: str) -> float:
    """Between a text and what is behind it, 1 to 21."""
    both = [luminance(page.evaluate(script, place)) for script in (COLOR, BACKGROUND)]
    return (max(both) + 0.05) / (min(both) + 0.05)

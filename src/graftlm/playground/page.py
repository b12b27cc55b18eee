"""The page: what it shows, and what happens when a visitor does something."""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from graftlm import decoder
from graftlm.attention_page import attention_page
from graftlm.playground.runs import KNOWN_ERRORS, Column, Playground, Request, Run

MAX_SCALE = 2.0
AT_ONCE = 8  # visitors whose texts are written at the same time; more wait in a queue
IN_QUEUE = 64  # visitors that may wait
STYLE = Path(__file__).with_name("page.css")
# Fonts of the visitor's machine, and colours that can be read: the default's are pale.
THEME = gr.themes.Default(
    primary_hue="blue",
    neutral_hue="slate",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover_dark="*primary_600",
)
# Gradio shows texts in disabled fields, which keyboards and screen readers skip, and lets their
# label name the button beside them.
READABLE = """() => document.querySelectorAll(".text textarea").forEach(field => {
    field.disabled = false;
    field.readOnly = true;
    field.ariaLabel = field.closest("label").querySelector("span").innerText.trim();
})"""
COMPLETION, CHAT = "Completion", "Chat"
NOT_SHOWN = "Press the button to see who reads what in the last run."
UNFINISHED = "The text as far as it was written; press the button again when all is."

Updates = dict[Any, Any]  # component: its new value


class Page:
    """The playground as a Gradio page.

    Args:
        playground: Who writes.
        title: What the page calls the composed model.
    """

    def __init__(self, playground: Playground, title: str):
        self.playground = playground
        # Nothing is sent anywhere: no analytics, no fonts or scripts of other hosts.
        with gr.Blocks(
            title="graftlm playground", analytics_enabled=False, fill_width=True
        ) as self.blocks:
            heading = f"<h1>{html.escape(title)}</h1><p>{self.about()}</p>"
            gr.HTML(heading, elem_id="about", padding=False)
            with gr.Row(elem_id="top"):
                with gr.Column(scale=3, min_width=300):
                    self.add_prompt()
                with gr.Column(scale=2, min_width=300, elem_id="settings"):
                    self.scales = self.add_scales()
                    self.sampling = self.add_sampling()
            with gr.Row(elem_id="columns"):
                self.texts, self.notes = self.add_columns()
            with gr.Accordion("Attention of the bridges", open=False, elem_id="attention"):
                self.show = gr.Button("Show the attention of the last run", size="md")
                self.attention = gr.HTML(said(NOT_SHOWN), padding=False)
            self.connect()

    # ---- what it shows -------------------------------------------------------------------

    def about(self) -> str:
        """The composition in two sentences of HTML."""
        model = self.playground.model
        count = len(model.config.connections)
        parts = [f"<b>{name}</b> ({kind_of(part)})" for name, part in model.augmenting.items()]
        return (
            f"The <b>anchor</b> ({kind_of(model.anchor)}) reads {' and '.join(parts)} through "
            f"{count} {'bridge' if count == 1 else 'bridges'}. Each writes on its own below; "
            "<b>composed</b> is the anchor with its bridges."
        )

    def add_prompt(self) -> None:
        """The prompt, how to take it, and the buttons."""
        can_chat = self.playground.can_chat
        limit = self.playground.limits.max_characters
        self.prompt = gr.Textbox(
            label=f"Prompt (up to {limit:,} characters; Shift+Enter generates)",
            lines=5,
            max_lines=5,
            autofocus=True,
            elem_id="prompt",
        )
        self.mode = gr.Radio(
            [COMPLETION, CHAT],
            value=CHAT if can_chat else COMPLETION,
            interactive=can_chat,
            label="The prompt is",
            info="Completion: a text to continue. Chat: what a user says; each prompt begins anew."
            if can_chat
            else "A text to continue. No chat: the anchor's tokenizer has no chat template.",
            elem_id="mode",
        )
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button(
                "Generate", variant="primary", min_width=120, elem_id="generate"
            )
            self.stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="stop")
        self.status = gr.HTML(said("Ready."), elem_id="status", padding=False)

    def add_scales(self) -> list[Any]:
        """A switch and a slider for each augmenting model."""
        made: list[Any] = []
        for name, scale in self.playground.model.config.scales.items():
            with gr.Group():
                switch = gr.Checkbox(
                    True, label=f"Read {name}", elem_id=f"switch-{name}", container=True
                )
                slider = gr.Slider(
                    min(0.0, scale),
                    max(MAX_SCALE, scale),
                    value=scale,
                    step=0.05,
                    label=f"Scale of {name}",
                    info="What the bridges read of it, times this: 1 as trained, 0 not at all.",
                    elem_id=f"scale-{name}",
                )
            made += [switch, slider]
        return made

    def add_sampling(self) -> list[Any]:
        """How tokens are picked."""
        limit = self.playground.limits.max_new_tokens
        default = Request(prompt="", max_new_tokens=min(64, limit))
        with gr.Accordion("Sampling and length", open=False, elem_id="sampling"):
            return [
                gr.Slider(
                    1, limit, value=default.max_new_tokens, step=1, label="New tokens",
                    elem_id="new-tokens",
                ),
                gr.Slider(
                    0, 2, value=default.temperature, step=0.05, label="Temperature",
                    info="0 takes the likeliest token", elem_id="temperature",
                ),
                gr.Slider(0.05, 1, value=default.top_p, step=0.05, label="Top-p"),
                gr.Slider(0, 200, value=default.top_k, step=1, label="Top-k", info="0 for all"),
                gr.Number(value=default.seed, label="Seed", elem_id="seed"),
            ]  # fmt: skip

    def add_columns(self) -> tuple[dict[str, gr.Textbox], dict[str, gr.HTML]]:
        """A box and a line below it for each part."""
        texts, notes = {}, {}
        for name in self.playground.parts:
            with gr.Column(min_width=260):
                texts[name] = gr.Textbox(
                    # Several words: Gradio translates single ones that it knows, such as "code".
                    label="composed: the anchor with its bridges"
                    if name == "composed"
                    else f"{name} alone",
                    lines=11,
                    max_lines=11,
                    interactive=False,
                    buttons=["copy"],
                    elem_id=name if name in ("anchor", "composed") else f"augmenting-{name}",
                    elem_classes="text",
                )
                notes[name] = gr.HTML(said(""), elem_classes="note", padding=False)
        return texts, notes

    # ---- what happens --------------------------------------------------------------------

    def connect(self) -> None:
        """Tell Gradio what calls what."""
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [
            self.status, self.generate, self.stop, self.attention,
            *self.texts.values(), *self.notes.values(),
        ]  # fmt: skip
        gr.on(
            [self.generate.click, self.prompt.submit],
            self.on_generate,
            [self.prompt, self.mode, *self.sampling, *self.scales],
            outputs,
            concurrency_limit=AT_ONCE,
            trigger_mode="once",
            **hidden,
        )
        # Not in the queue: it must come through while others wait.
        self.stop.click(self.on_stop, None, None, queue=False, **hidden)
        self.show.click(
            self.on_show, None, [self.attention], api_visibility="private", concurrency_limit=1
        )
        self.blocks.load(js=READABLE, **hidden)
        self.blocks.unload(self.on_leave)
        self.blocks.queue(max_size=IN_QUEUE)

    def on_generate(
        self, request: gr.Request, prompt: str, mode: str, *values: Any
    ) -> Iterator[Updates]:
        """Write, and show what has been written until all is."""
        sampling, scales = values[: len(self.sampling)], values[len(self.sampling) :]
        try:
            run = self.playground.start(
                request.session_hash, self.request(prompt, mode, sampling, scales)
            )
        except KNOWN_ERRORS as error:
            yield {self.status: alarm(str(error))}
            return
        changes: Updates = {self.attention: said(NOT_SHOWN)}  # that of the last run is no longer
        for _ in run.looks():
            yield self.updates(run) | changes
            changes = {}

    def request(
        self, prompt: str, mode: str, sampling: Sequence[Any], scales: Sequence[Any]
    ) -> Request:
        """What the page's fields say.

        Raises:
            ValueError: If a number was deleted.
        """
        if None in (*sampling, *scales):
            raise ValueError("a setting is empty; write a number into it")
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
        switches = zip(scales[::2], scales[1::2], strict=True)
        return Request(
            prompt=prompt,
            chat=mode == CHAT,
            scales={
                name: scale if is_on else 0.0
                for name, (is_on, scale) in zip(
                    self.playground.model.augmenting, switches, strict=True
                )
            },
            **dict(zip(names, sampling, strict=True)),
        )

    def updates(self, run: Run) -> Updates:
        """What the page shows of a run now."""
        changes: Updates = {
            self.generate: gr.update(interactive=run.is_over),
            self.stop: gr.update(interactive=not run.is_over),
            self.status: said(state_of(run)),
        }
        for name, column in run.columns.items():
            changes[self.texts[name]] = column.text
            changes[self.notes[name]] = note(column)
        return changes

    def on_stop(self, request: gr.Request) -> None:
        """End the visitor's run; what is written stays."""
        self.playground.stop(request.session_hash)

    def on_leave(self, request: gr.Request) -> None:
        """The tab was closed: nobody reads on."""
        self.playground.leave(request.session_hash)

    def on_show(self, request: gr.Request) -> str:
        """The attention of the visitor's last run."""
        run = self.playground.runs.get(request.session_hash)
        is_over = run is not None and run.is_over
        try:
            page = attention_page(self.playground.explain(request.session_hash))
        except KNOWN_ERRORS as error:
            return alarm(str(error))
        if self.playground.runs.get(request.session_hash) is not run:
            return said(NOT_SHOWN)  # another run has begun meanwhile, to which this does not belong
        # A frame of its own, which reaches nothing of ours.
        return said("" if is_over else UNFINISHED) + (
            '<iframe title="Attention of the bridges" sandbox="allow-scripts" '
            f'srcdoc="{html.escape(page)}"></iframe>'
        )


def kind_of(model: Any) -> str:
    """A model in few words."""
    return f"{model.config.model_type}, {decoder.num_layers(model)} layers"


def state_of(run: Run) -> str:
    """A run in one sentence."""
    if not run.is_over:
        return "Writing: the models take turns, a token each."
    if run.stopping.is_set():
        return "Stopped."
    if any(column.error for column in run.columns.values()):
        return "Done, but not everyone could write."
    return "Done."


def note(column: Column) -> str:
    """How far one model is, and how fast it was in its own turns."""
    if column.error:
        return alarm(column.error)
    if not column.seconds:
        return said("nothing written" if column.is_over else "waits for its turn")
    words = [count_of(column), f"first after {duration(column.seconds[0])}"]
    if column.seconds[1:]:
        words.append(f"then {column.speed:.3g} tokens/s")
    return said(" · ".join(words))


def count_of(column: Column) -> str:
    """How many tokens are written; the end of the text is no part of it."""
    count = len(column.ids) - column.has_ended
    words = "1 token" if count == 1 else f"{count} tokens"
    return f"{words} and end" if column.has_ended else words


def duration(seconds: float) -> str:
    """A time that is not rounded to nothing."""
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.{0 if seconds >= 0.01 else 1}f} ms"


def said(words: str) -> str:
    """Words that a screen reader reads out when they change."""
    return f'<div aria-live="polite">{html.escape(words)}</div>'


def alarm(words: str) -> str:
    """What went wrong."""
    return f'<div role="alert" class="alert">{html.escape(words[:1].upper() + words[1:])}.</div>'

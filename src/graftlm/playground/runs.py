"""What the models write for one prompt: a thread for each, in turns, for several visitors."""

import logging
import math
import threading
import time
from collections.abc import Generator, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from graftlm import decoder
from graftlm.causal_lm import ComposedForCausalLM
from graftlm.explain import Explanation, explain
from graftlm.greedy import GREEDY
from graftlm.playground.sampling import Sampler
from graftlm.playground.turns import Turns

KNOWN_ERRORS = (ValueError, TypeError, OSError, torch.OutOfMemoryError)  # sentences for people
PERIOD = 0.05  # seconds between two looks at what has been written
TOP = 10  # of the likeliest next tokens, in the page of attention
# Of attention: a page of 20 million is 2 MB and opens within 2 seconds. More take memory and
# everyone's turns: both grow with the square of the text.
MAX_WEIGHTS = 20_000_000

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a visitor may ask for."""

    max_characters: int = 4000
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be a positive whole number")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a visitor asks for.

    Args:
        prompt: The text to continue, or a user's turn.
        chat: Whether it is a user's turn in a chat.
        scales: Of each augmenting model, for this run.
        max_new_tokens: Where to stop.
        temperature: 0 takes the likeliest token.
        top_p: Sample from the likeliest tokens of this sum; 1 from all.
        top_k: Sample from this many of the likeliest tokens; 0 from all.
        seed: Of the sampling, the same for each model.
    """

    prompt: str
    chat: bool = False
    scales: Mapping[str, float] = field(default_factory=dict)
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def check(self, limits: Limits) -> None:
        """Refuse what is too much, or no setting.

        Raises:
            ValueError: In one sentence for the visitor.
        """
        if len(self.prompt) > limits.max_characters:
            raise ValueError(
                f"the prompt has {len(self.prompt)} characters, but this page takes up to "
                f"{limits.max_characters}; shorten it"
            )
        if not self.prompt.strip():
            raise ValueError("the prompt is empty, so there is nothing to continue; write one")
        if not 1 <= self.max_new_tokens <= limits.max_new_tokens:
            raise ValueError(
                f"new tokens is {self.max_new_tokens}, but must be from 1 to "
                f"{limits.max_new_tokens} on this page"
            )
        ranges = {
            "temperature": (self.temperature, 0, 10),
            "top-p": (self.top_p, 0.01, 1),
            "top-k": (self.top_k, 0, 1000),
            "seed": (self.seed, 0, 2**32),
        }
        ranges |= {f"scale of {name}": (scale, -10, 10) for name, scale in self.scales.items()}
        for name, (value, lowest, highest) in ranges.items():
            if not lowest <= value <= highest:  # nor is NaN
                raise ValueError(f"{name} is {value}, but must be from {lowest} to {highest}")
        self.check_whole()

    def check_whole(self) -> None:
        """Refuse fractions where there are none.

        Raises:
            ValueError: In one sentence for the visitor.
        """
        counts = {"new tokens": self.max_new_tokens, "top-k": self.top_k, "seed": self.seed}
        for name, value in counts.items():
            if value % 1:
                below = math.floor(value)
                raise ValueError(
                    f"{name} is {value}, but must be a whole number; write {below} or {below + 1}"
                )

    def sampler(self) -> LogitsProcessorList:
        """What picks other tokens than the likeliest, if anything does."""
        if self.temperature == 0:
            return LogitsProcessorList()
        return LogitsProcessorList(
            [
                Sampler(
                    seed=self.seed,
                    temperature=self.temperature,
                    top_k=self.top_k,
                    top_p=self.top_p,
                )
            ]
        )


class Column(BaseStreamer, StoppingCriteria):
    """What one model writes in one run.

    Args:
        tokenizer: Of that model.
        turns: Its own are counted in `seconds`, and waiting is not.
        stopping: Ends it, when it is set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: Turns, stopping: threading.Event):
        self.tokenizer = tokenizer
        self.turns = turns
        self.stopping = stopping
        self.prompt_ids: list[int] = []
        self.ids: list[int] = []
        self.seconds: list[float] = []  # to the first token, to the second, ...
        self.error = ""
        self.has_ended = False  # by itself: the last token is no text, but the end of it
        self.is_over = False
        self.started = 0.0

    def put(self, value: torch.Tensor) -> None:
        """Take what `generate` hands over: the prompt first, then token by token."""
        if value.dim() == 2:
            self.prompt_ids = value[0].tolist()
            return
        self.seconds.append(time.perf_counter() - self.started)
        self.ids += value.tolist()
        self.turns.pass_on()
        self.started = time.perf_counter()

    def end(self) -> None:
        """Nothing: `generate` may also end without saying so, by an error."""

    def __call__(  # pyrefly: ignore[bad-override]
        self, input_ids: torch.Tensor, scores: Any, **options: Any
    ) -> torch.Tensor:
        """Whether to stop."""
        return torch.full((len(input_ids),), self.stopping.is_set(), device=input_ids.device)

    @property
    def text(self) -> str:
        """What has been written, without a character of which the end is missing."""
        text: Any = self.tokenizer.decode(list(self.ids), skip_special_tokens=True)
        return text if self.is_over else text.rstrip("\ufffd")

    @property
    def speed(self) -> float:
        """Tokens a second behind the first, or NaN if there are none."""
        rest = self.seconds[1:]
        return len(rest) / sum(rest) if rest else math.nan


class Run:
    """What all models write for one request.

    Args:
        request: The visitor's.
        columns: By part.
        stopping: Shared by the columns.
    """

    def __init__(self, request: Request, columns: dict[str, Column], stopping: threading.Event):
        self.request = request
        self.columns = columns
        self.stopping = stopping
        self.threads: list[threading.Thread] = []

    def stop(self) -> None:
        """Let every model end with the token it is at."""
        self.stopping.set()

    def wait(self) -> None:
        """Until all have ended."""
        for thread in self.threads:
            thread.join()

    @property
    def is_over(self) -> bool:
        """Whether all have ended."""
        return all(column.is_over for column in self.columns.values())

    def looks(self) -> Generator[None, None, None]:
        """Comes back now and then until all is written, and once more then.

        Whoever stops looking stops the run.
        """
        try:
            while not self.is_over:
                yield
                time.sleep(PERIOD)
            yield
        finally:
            self.stop()


class Playground:
    """A composed model that writes for several visitors.

    Args:
        model: The composed model.
        tokenizer: The anchor's.
        limits: What a visitor may ask for.
    """

    def __init__(
        self, model: ComposedForCausalLM, tokenizer: PreTrainedTokenizerBase, limits: Limits
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.limits = limits
        self.turns = Turns()
        self.runs: dict[Hashable, Run] = {}  # the last of each visitor
        self.threads: set[threading.Thread] = set()  # also of runs that were left

    @property
    def parts(self) -> list[str]:
        """Who writes, from left to right."""
        return ["anchor", *self.model.augmenting, "composed"]

    @property
    def can_chat(self) -> bool:
        """Whether the anchor's tokenizer knows how to write a chat."""
        return bool(self.tokenizer.chat_template)

    def start(self, visitor: Hashable, request: Request) -> Run:
        """Begin to write; a run of the same visitor ends.

        Args:
            visitor: Who asks.
            request: What for.

        Raises:
            ValueError: If the request is refused, in one sentence.
        """
        request.check(self.limits)
        if request.chat and not self.can_chat:
            raise ValueError("the anchor's tokenizer has no chat template; choose completion")
        self.leave(visitor)  # not before: the page goes on to show the last run of who is refused
        stopping = threading.Event()
        run = Run(
            request,
            {name: Column(self.tokenizer_of(name), self.turns, stopping) for name in self.parts},
            stopping,
        )
        self.runs[visitor] = run
        for name, column in run.columns.items():
            thread = threading.Thread(
                target=self.write, args=(name, column, request), name=name, daemon=True
            )
            run.threads.append(thread)
        self.threads -= {thread for thread in self.threads.copy() if not thread.is_alive()}
        for thread in run.threads:
            thread.start()
            self.threads.add(thread)
        return run

    def stop(self, visitor: Hashable) -> None:
        """Stop a visitor's run, if there is one."""
        run = self.runs.get(visitor)
        if run is not None:
            run.stop()

    def leave(self, visitor: Hashable) -> None:
        """Stop and forget a visitor's run, if there is one."""
        run = self.runs.pop(visitor, None)
        if run is not None:
            run.stop()

    def close(self) -> None:
        """Stop all runs, and wait for them and for those that were left."""
        for visitor in list(self.runs):
            self.leave(visitor)
        for thread in self.threads.copy():
            thread.join()

    def tokenizer_of(self, name: str) -> Any:
        """The tokenizer of one part: the anchor's, unless it has one of its own."""
        processor = self.model.processor
        own = {} if processor is None else processor.augmenting_tokenizers
        return own.get(name, self.tokenizer)

    def write(self, name: str, column: Column, request: Request) -> None:
        """Let one part write; what goes wrong is said in its column."""
        try:
            with self.turns, self.scope(name, request):
                if not column.stopping.is_set():
                    column.started = time.perf_counter()
                    self.generate(name, column, request)
        except KNOWN_ERRORS as error:
            column.error = str(error)
        except Exception as error:
            logger.exception("the playground's %s failed", name)
            column.error = f"{type(error).__name__}: {error} (the terminal shows where)"
        finally:
            column.is_over = True

    def scope(self, name: str, request: Request) -> AbstractContextManager[None]:
        """In which one part runs; of its thread only."""
        if name == "anchor":
            return self.model.anchor_only()
        if name == "composed":
            return self.model.scaled(request.scales)
        return nullcontext()

    def generate(self, name: str, column: Column, request: Request) -> None:
        """Read the prompt and write token by token into a column."""
        model: Any = self.model.augmenting.get(name, self.model)
        if not model.can_generate():
            raise ValueError(
                f"augmenting model {name!r} was composed without its head, so it writes nothing "
                "alone"
            )
        inputs = self.encode(column.tokenizer, request)
        self.check_fits(name, inputs["input_ids"].shape[1] + request.max_new_tokens)
        self.check_vocabulary(name, int(inputs["input_ids"].max()))
        pad = column.tokenizer.pad_token_id
        model.generate(
            **inputs.to(model.device),
            max_new_tokens=request.max_new_tokens,
            **GREEDY,  # and the sampler: the page shows all settings there are
            logits_processor=request.sampler(),
            pad_token_id=column.tokenizer.eos_token_id if pad is None else pad,
            streamer=column,
            stopping_criteria=[column],
        )
        column.has_ended = len(column.ids) < request.max_new_tokens and not column.stopping.is_set()

    def encode(self, tokenizer: Any, request: Request) -> Any:
        """The prompt as one tokenizer's tokens; without a chat template, as plain text."""
        text, is_chat = request.prompt, request.chat and bool(tokenizer.chat_template)
        if is_chat:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(
            text, return_tensors="pt", add_special_tokens=not is_chat, return_token_type_ids=False
        )

    def check_fits(self, name: str, length: int) -> None:
        """Refuse texts longer than a model has positions for.

        Raises:
            ValueError: Naming the first model that is too short.
        """
        models = {"anchor": self.model.anchor, **self.model.augmenting}
        for part in [name] if name in models else models:
            size = decoder.learned_positions(models[part])
            if size is not None and length > size:
                raise ValueError(
                    f"prompt and new tokens are {length} tokens together, but {part} has "
                    f"positions for {size}; shorten the prompt, or ask for fewer new tokens"
                )

    def check_vocabulary(self, name: str, largest: int) -> None:
        """Refuse a token that an augmenting model on its own does not have.

        Raises:
            ValueError: Naming it.
        """
        if name in self.model.augmenting:
            config = self.model.augmenting[name].config
            size = decoder.text_config(config).vocab_size
            if largest >= size:
                raise ValueError(
                    f"the prompt holds token {largest}, but {name} has tokens 0 to {size - 1} only"
                )

    def explain(self, visitor: Hashable) -> Explanation:
        """What the bridges did in a visitor's last run.

        Raises:
            ValueError: If there is none, or its text is too long to show.
        """
        run = self.runs.get(visitor)
        column = None if run is None else run.columns["composed"]
        if run is None or column is None or not column.prompt_ids:
            raise ValueError("nothing has been written yet; press Generate first")
        ids = [*column.prompt_ids, *column.ids]
        num_heads = self.model.model.num_bridge_heads * len(self.model.bridges)
        weights = num_heads * len(ids) ** 2
        if weights > MAX_WEIGHTS:
            raise ValueError(
                f"the text has {len(ids)} tokens, whose attention is about {weights:,} numbers, "
                f"but this page shows up to {MAX_WEIGHTS:,}; ask for fewer tokens"
            )
        with self.model.scaled(run.request.scales):
            return explain(
                self.model,
                text=None,
                input_ids=ids,
                max_new_tokens=0,
                top=TOP,
                num_prompt=len(column.prompt_ids),
                turn=self.turns,
            )

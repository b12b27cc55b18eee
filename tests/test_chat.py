"""Chats across tokenizers: each model reads its own markup around the same contents."""

import copy
import json
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from graftlm.chat import PLAIN_TEMPLATE, ROLES, ChatFormat, MessageFinder
from graftlm.processor import ComposedProcessor
from graftlm.reading import TextReader, read_row
from graftlm.symbols import Symbols, symbols_of
from two_tokenizers import byte_tokenizer, compose_pair, word_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma's: another name for the assistant, BOS before everything, no system.
TURNS = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "[{{ 'model' if m['role'] == 'assistant' else m['role'] }}]\n{{ m['content'] }}[/]\n"
    "{% endfor %}{% if add_generation_prompt %}[model]\n{% endif %}"
)
# As Qwen's: a system prompt that nobody asked for.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + MARKED
)
CHAT = [
    {"role": "user", "content": "Where is the fox?"},
    {"role": "assistant", "content": "Over the dog.\n\nIt jumps."},
    {"role": "user", "content": "Why <|im_end|> so?"},
]


def plain(text: Any) -> str:
    """Without the space that the decoder of this tokenizer leaves at the beginning."""
    return str(text).replace("<s> ", "<s>")


def with_template(tokenizer: Any, template: str | None) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def read_chat(ours: Any, theirs: Any, messages: Any) -> tuple[list[int], Any]:
    """The anchor's tokens of a chat, and what the augmenting model reads of them."""
    text = ours.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = ours(text, add_special_tokens=False)["input_ids"]
    return ids, read_row(TextReader(ours, theirs), None, ids, [True] * len(ids))


@pytest.mark.parametrize("template", [MARKED, DEFAULT_SYSTEM])
def test_headers_and_footers_are_learned_from_a_template(template: str) -> None:
    tokenizer = with_template(byte_tokenizer(), template)
    for found in (ChatFormat.written(tokenizer), ChatFormat.tokenized(tokenizer)):
        assert found is not None
        headers = {role: symbols_of(tokenizer, f"<|im_start|>{role}\n") for role in ROLES}
        assert found.headers == headers
        assert found.footers == dict.fromkeys(ROLES, symbols_of(tokenizer, "<|im_end|>\n"))


def test_a_template_without_a_system_takes_it_for_a_user() -> None:
    found = ChatFormat.written(with_template(word_tokenizer(), TURNS))
    assert found is not None
    assert found.headers == {
        "user": (*"[user]\n",),
        "assistant": (*"[model]\n",),
        "system": (*"[user]\n",),
    }
    assert set(found.footers.values()) == {(*"[/]\n",)}


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}", "{{ oops( }}"])
def test_some_templates_mark_no_messages(template: str | None) -> None:
    assert ChatFormat.written(with_template(byte_tokenizer(), template)) is None
    assert MessageFinder.of(with_template(byte_tokenizer(), template)) is None


def test_a_chat_anchor_reads_a_chat_model_in_its_own_markup() -> None:
    ours, theirs = (
        with_template(byte_tokenizer(), MARKED),
        with_template(word_tokenizer(), TURNS),
    )
    chat = CHAT[:2]
    ids, row = read_chat(ours, theirs, chat)
    rest = [token for token, _ in TextReader(ours, theirs).unsettled(row.reading)]
    seen = plain(theirs.decode([*row.ids, *rest]))
    assert seen == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # Nothing of an answer is seen before it: markup opens a turn once the anchor's is complete.
    start = len(ours.encode("<|im_start|>user\nWhere is the fox?"))
    reader = TextReader(ours, theirs)
    before = read_row(reader, None, ids[:start], [True] * start).reading
    assert "model" not in theirs.decode([*row.ids[: before.num_tokens]])


def test_a_chat_anchor_reads_a_base_model_as_paragraphs() -> None:
    ours, theirs = with_template(byte_tokenizer(), MARKED), word_tokenizer()
    _, row = read_chat(ours, theirs, CHAT[:2])
    seen = plain(theirs.decode(row.ids))
    assert seen.startswith("<s>Where is the fox?\n\nOver the dog.\n\nIt jumps")


def test_a_base_anchor_reads_a_chat_model() -> None:
    """It gets a plain template, whose marks are found again in its text."""
    theirs = with_template(word_tokenizer(), TURNS)
    model = compose_pair()
    processor = ComposedProcessor(byte_tokenizer(), {"augmenting": theirs}, model.config)
    ids = processor.apply_chat_template(CHAT[:1], add_generation_prompt=True)["input_ids"]
    assert processor.decode(ids[0]) == "### User\nWhere is the fox?\n\n### Assistant\n"
    row = read_row(processor.readers["augmenting"], None, ids[0].tolist(), [True] * ids.shape[1])
    rest = TextReader(processor.tokenizer, theirs).unsettled(row.reading)
    seen = plain(theirs.decode([*row.ids, *(i for i, _ in rest)]))
    assert seen == "<s>[user]\nWhere is the fox?[/]\n[model]\n"
    assert byte_tokenizer().chat_template is None


def test_text_that_only_looks_like_markup_stays_text() -> None:
    ours, theirs = with_template(byte_tokenizer(), MARKED), word_tokenizer()
    texts = ("<|im_start|>users\nhello ", "a <|im_end|>b <|im_start|><|im_start|>user\nc ")
    for text, expected in zip(texts, ("<s>users\nhello", "<s>a b \n\nc"), strict=True):
        ids = ours(text)["input_ids"]
        row = read_row(TextReader(ours, theirs), None, ids, [True] * len(ids))
        assert plain(theirs.decode(row.ids)) == expected


def test_markup_is_found_however_the_stream_is_cut() -> None:
    ours = with_template(byte_tokenizer(), MARKED)
    finder = MessageFinder.of(ours)
    assert finder is not None
    symbols = symbols_of(ours, "x<|im_end|>\n<|im_start|>user\n<|im_start|>us<|im_end|>y")
    held, whole = finder.find((), symbols)
    assert held == ()
    assert whole == [
        ("text", "x"),
        ("close", "\n"),
        ("open", "user"),
        ("text", "usy"),
    ]
    pieces: list[tuple[str, str]] = []
    for symbol in symbols:
        held, found = finder.find(held, (symbol,))
        pieces += found
    assert [(k, v) for k, v in pieces if k != "text"] == whole[1:3]
    assert "".join(v for k, v in pieces if k == "text") == "xusy"


THINKING = MARKED.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
# As Vicuna's: nothing of it is a special token but the end of an answer.
WORDS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
TEXT = "The first one.\n\nThe second one.\n\ndef add():\n    return\n\n\nIt jumps over it. "


@pytest.mark.parametrize("template", [MARKED, THINKING, WORDS, PLAIN_TEMPLATE, DEFAULT_SYSTEM])
def test_a_text_that_is_no_chat_is_read_as_it_is(template: str) -> None:
    for other in (word_tokenizer(), with_template(word_tokenizer(), TURNS)):
        reader = TextReader(with_template(byte_tokenizer(), template), other)
        ids = byte_tokenizer()(TEXT)["input_ids"]
        row = read_row(reader, None, ids, [True] * len(ids))
        rest = [token for token, _ in reader.unsettled(row.reading)]
        held = "".join(map(str, row.reading.held))  # a space may begin " ASSISTANT: "
        assert plain(other.decode([*row.ids, *rest])) + held == f"<s>{TEXT}"


@pytest.mark.parametrize("template", [MARKED, THINKING, WORDS, PLAIN_TEMPLATE])
def test_a_conversation_is_found_in_every_kind_of_markup(template: str) -> None:
    ours, theirs = (
        with_template(byte_tokenizer(), template),
        with_template(word_tokenizer(), TURNS),
    )
    chat = [
        {"role": "user", "content": "One line.\n\nAnother."},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ]
    _, row = read_chat(ours, theirs, chat)
    rest = [token for token, _ in TextReader(ours, theirs).unsettled(row.reading)]
    seen = plain(theirs.decode([*row.ids, *rest]))
    assert seen == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


# ---- templates of real families, shortened ---------------------------------------------------

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('not here') }}"
    "{% elif m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('not here') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
# The system's words stand in the user's first turn.
GEMMA = (
    "{{ '<s>' }}{% set ns = namespace(first='') %}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{% set ns.first = m['content'] + '\n\n' %}{% else %}"
    "{{ '<turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + ns.first }}"
    "{% set ns.first = '' %}{{ m['content'] + '</turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<turn>' + m['role'] + '</turn>\n\n' }}"
    "{% if m['role'] == 'system' %}{{ 'Today is ' + strftime_now('%d %b %Y') + '.\n\n' }}"
    "{% endif %}{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant</turn>\n\n' }}{% endif %}"
)
DEEPSEEK = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}{{ '<user>' + m['content'] }}"
    "{% else %}{{ '<model>' + m['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)
# What ends a question begins the answer.
NEMO = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('not here') }}{% elif m['role'] == 'user' %}"
    "{{ '[INST]' + m['content'] + '[/INST]' }}{% else %}{{ m['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# Its marks swallow the line break behind them; a text that is not to go on has an end.
PHI = (
    "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The first message begins without the line break that ends the one before.
OLMO = (
    "{{ '<s>' }}{% for m in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)
# Only the last answer has a place to think, which is empty.
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "llama 2": LLAMA_2,
    "mistral": MISTRAL,
    "nemo": NEMO,
    "gemma": GEMMA,
    "llama 3": LLAMA_3,
    "deepseek": DEEPSEEK,
    "phi": PHI,
    "olmo": OLMO,
    "qwen 3": QWEN_3,
    "words": WORDS,
    "chatml": MARKED,
}
SPECIAL = ("<s>", "</s>", "[INST]", "[/INST]", "<turn>", "</turn>", "<user>", "<model>")
SWALLOWING = ("<system>", "<assistant>", "<end>")


def family(name: str) -> Any:
    """Single bytes, the family's template, and the special tokens it has there."""
    if name == "chatml":
        return with_template(byte_tokenizer(), MARKED)
    core = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    special = [s for s in SPECIAL if not (name == "llama 2" and "INST" in s)]
    tokens = [AddedToken(s, normalized=False, rstrip=name == "phi") for s in special]
    if name == "phi":
        tokens += [AddedToken(s, normalized=False, rstrip=True) for s in SWALLOWING]
    core.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=FAMILIES[name]
    )


def seen_by(ours: Any, theirs: Any, messages: Any, **options: Any) -> str:
    """What an augmenting model has read when the anchor has a chat."""
    chat: Any = ours.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    reader = TextReader(ours, theirs)
    row = read_row(reader, None, chat, [True] * len(chat))
    return theirs.decode([*row.ids, *(token for token, _ in reader.unsettled(row.reading))])


LONG = [
    {"role": "user", "content": "Where is the fox?"},
    {"role": "assistant", "content": "Over the dog.\n\nIt jumps."},
    {"role": "user", "content": "Why so?"},
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_messages_of_every_family_are_found(name: str) -> None:
    theirs = with_template(byte_tokenizer(), MARKED)
    seen = seen_by(family(name), theirs, LONG, add_generation_prompt=True)
    wanted = theirs.apply_chat_template(LONG, tokenize=False, add_generation_prompt=True)
    if name in ("llama 2", "mistral"):  # an answer begins with a space, which is not there yet
        wanted = wanted.removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert seen.startswith(wanted)
    else:
        assert seen == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_messages_are_written_as_every_family_writes_them(name: str) -> None:
    theirs, ours = family(name), with_template(byte_tokenizer(), MARKED)
    seen = seen_by(ours, theirs, LONG, add_generation_prompt=True)
    wanted: Any = theirs.apply_chat_template(
        LONG, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    # BOS is what the tokenizer puts before a text; this one puts none.
    assert seen.rstrip(" ") == theirs.decode(wanted).removeprefix("<s>").rstrip(" ")


def test_ends_are_those_of_characters_where_a_tokenizer_drops_some() -> None:
    """Such as the spaces that no token has before a special one."""
    core = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    core.normalizer = normalizers.Strip()
    core.add_special_tokens([AddedToken(s, normalized=False) for s in SPECIAL])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=FAMILIES["deepseek"]
    )
    ours = with_template(byte_tokenizer(), MARKED)
    chat: Any = ours.apply_chat_template(
        [{"role": "user", "content": "Where?   "}, *LONG[1:]], tokenize=True, return_dict=False
    )
    reader = TextReader(ours, theirs)
    row = read_row(reader, None, chat, [True] * len(chat))
    spelled = len("Where?   Over the dog.\n\nIt jumps.Why so?")
    assert row.reading.num_chars == spelled
    ends = [*row.ends, *(end for _, end in reader.unsettled(row.reading))]
    assert ends[-1] == spelled


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_is_no_chat_of_any_family(name: str) -> None:
    """Where an answer begins with a space only, each word was an answer."""
    ours, theirs = family(name), with_template(byte_tokenizer(), MARKED)
    text = f"{ours.bos_token or ''}The quick brown fox: it jumps."
    ids = ours(text, add_special_tokens=False)["input_ids"]
    reader = TextReader(ours, theirs)
    row = read_row(reader, None, ids, [True] * len(ids))
    rest = [token for token, _ in reader.unsettled(row.reading)]
    assert theirs.decode([*row.ids, *rest]) == "The quick brown fox: it jumps."


def test_a_system_message_is_one_on_every_day() -> None:
    """What a template says of the date is part of the message, not of its header."""
    system = [{"role": "system", "content": "Be kind."}, *LONG[:1]]
    theirs = with_template(byte_tokenizer(), MARKED)
    seen = seen_by(family("llama 3"), theirs, system)
    assert seen.startswith("<|im_start|>system\nToday is ")
    assert "Be kind.<|im_end|>\n<|im_start|>user\nWhere is the fox?" in seen
    written = ChatFormat.written(family("llama 3"))
    assert written is not None
    assert "Today" not in spelled(written.headers["system"])


def spelled(symbols: Symbols) -> str:
    return "".join(map(str, symbols))


@pytest.mark.parametrize("name", ["gemma", "llama 2", "olmo", "deepseek", "nemo"])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_spaces_behind_special_tokens_are_the_tokenizer_s_own(scheme: str, name: str) -> None:
    """Llama's in transformers 5 puts one before a text, and none behind its special tokens."""
    spec = json.loads(word_tokenizer().backend_tokenizer.to_str())
    spec["pre_tokenizer"]["prepend_scheme"] = scheme
    core = Tokenizer.from_str(json.dumps(spec))
    special = [s for s in SPECIAL if not (name == "llama 2" and "INST" in s)]
    core.add_special_tokens([AddedToken(s, normalized=False) for s in special])
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", chat_template=FAMILIES[name]
    )
    ours = with_template(byte_tokenizer(), MARKED)
    chat: Any = ours.apply_chat_template(
        LONG, tokenize=True, return_dict=False, add_generation_prompt=name == "nemo"
    )
    reader = TextReader(ours, theirs)
    row = read_row(reader, None, chat, [True] * len(chat))
    seen = [*row.ids, *(token for token, _ in reader.unsettled(row.reading))]
    assert seen == theirs.apply_chat_template(LONG, tokenize=True, return_dict=False)


@pytest.mark.parametrize("name", ["gemma", "llama 2", "mistral", "nemo"])
def test_a_system_without_a_turn_of_its_own_is_a_user(name: str) -> None:
    system = [{"role": "system", "content": "Be kind."}, *LONG[:1]]
    theirs = family(name)
    ours = with_template(byte_tokenizer(), MARKED)
    seen = seen_by(ours, theirs, system, add_generation_prompt=name == "nemo")
    users = [{"role": "user", "content": "Be kind."}, *LONG[:1]]
    wanted = theirs.decode(theirs.apply_chat_template(users, tokenize=True, return_dict=False))
    assert seen == wanted.removeprefix("<s>")

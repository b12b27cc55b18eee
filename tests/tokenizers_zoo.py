"""Small real tokenizers of every kind, trained in a moment on a text of many scripts."""

import json
from collections.abc import Callable
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

# The beginning of article 1 of the Universal Declaration of Human Rights, and some code.
TEXTS = (
    "All human beings are born free and equal in dignity and rights. They are endowed with reason "
    "and conscience and should act towards one another in a spirit of brotherhood; they don't, "
    "they've, we'll, I'm, it's, you're, he'd. The tokenizer tokenizes tokenization, 12345 678!",
    "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama. Mereka "
    "dikaruniai akal dan hati nurani dan hendaknya bergaul satu sama lain.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler.",
    "Alla människor är födda fria och lika i värde och rättigheter. De är utrustade med förnuft.",
    "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом.",
    "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً وعليهم أن يعامل.",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม",
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "def area(radius):\n    if radius < 0:\n        raise ValueError('negative')\n\n"
    '    return 3.14159 * radius ** 2  # πr²\n\n\nclass Shape:\n\tname: str = "x"\n',
    "👩‍🚀 👍🏽 ❤️ 😀😀 🇮🇩 e\u0301 a\u0308 naïve café ﬁ Ⅷ ½ ｶﾞ <table><tr><td>1</td></tr></table>",
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words by a pattern, letters as bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None,
    *,
    normalizer: normalizers.Normalizer | None = None,
    size: int = 900,
    is_byte_level: bool = True,
    byte_fallback: bool = False,
) -> Tokenizer:
    """A BPE tokenizer."""
    unknown = None if is_byte_level else "<unk>"
    model = models.BPE(unk_token=unknown, byte_fallback=byte_fallback, fuse_unk=byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.normalizer = normalizer
    special = ["<unk>", "<s>", "</s>"]
    if byte_fallback:
        special += [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        special_tokens=special,
        limit_alphabet=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if is_byte_level else [],
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.decoder = decoders.ByteLevel() if is_byte_level else decoders.Metaspace()
    return tokenizer


def gpt2() -> Tokenizer:
    """Like GPT-2: byte-level BPE with its own pattern, offsets trimmed."""
    made = bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    return made


def roberta() -> Tokenizer:
    """Like GPT-2, with a space put before each text."""
    made = bpe(pre_tokenizers.ByteLevel(add_prefix_space=True))
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return made


def qwen() -> Tokenizer:
    """Like Qwen: numbers in groups of three, NFC."""
    return bpe(byte_level(CL100K), normalizer=normalizers.NFC())


def o200k() -> Tokenizer:
    """Like GPT-4o: contractions belong to the word."""
    return bpe(byte_level(O200K))


def deepseek() -> Tokenizer:
    """Like DeepSeek: several patterns, one after another."""
    return bpe(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
                pre_tokenizers.Split(Regex(r"[一-龥぀-ゟ゠-ヿ]+"), "isolated"),
                pre_tokenizers.Split(Regex(GPT2), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )


def llama3() -> Tokenizer:
    """Like Llama 3: a word in the vocabulary is taken whole, merges or not."""
    made = bpe(byte_level(CL100K))
    model = models.BPE(
        vocab={**made.get_vocab(with_added_tokens=False), "Ġtokenizers": 1000, "ration": 1001},
        merges=merges_of(made),
        ignore_merges=True,
    )
    made.model = model
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The merges of a BPE model."""
    return [(a, b) for a, b in json.loads(tokenizer.to_str())["model"]["merges"]]


def llama2() -> Tokenizer:
    """Like Llama 2: the whole text is one word, unknown characters are bytes."""
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made = bpe(
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        is_byte_level=False,
        byte_fallback=True,
        size=1200,
    )
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def llama2_added() -> Tokenizer:
    """The same with added tokens, behind which a text begins anew."""
    made = llama2()
    made.add_tokens([AddedToken("<table>", normalized=False), AddedToken("\n\n", normalized=False)])
    return made


def gemma() -> Tokenizer:
    """Like Gemma: one word, no space before it, runs of newlines are added tokens."""
    made = bpe(
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        is_byte_level=False,
        byte_fallback=True,
        size=1200,
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    contents = ("\n", "\n\n", "\n\n\n", "\t", "▁▁", "<table>", "<tr>", "</table>")
    made.add_tokens([AddedToken(content, normalized=False) for content in contents])
    return made


def metaspace(scheme: str) -> Callable[[], Tokenizer]:
    """BPE over words that begin with ▁, with unknown characters."""

    def make() -> Tokenizer:
        made = bpe(pre_tokenizers.Metaspace(prepend_scheme=scheme), is_byte_level=False, size=1000)
        made.add_tokens([AddedToken("<table>", normalized=False)])
        return made

    return make


def unigram() -> Tokenizer:
    """Like SentencePiece's Unigram with NFKC."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=700,
        show_progress=False,
        unk_token="<unk>",
        special_tokens=["<unk>", "</s>"],
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return made


def unigram_words() -> Tokenizer:
    """Like XLM-R: cut at whitespace first, which vanishes."""
    made = unigram()
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    return made


def bert() -> Tokenizer:
    """Like BERT: lower case, no accents, WordPiece."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, show_progress=False, special_tokens=special)
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


def added() -> Tokenizer:
    """Byte-level BPE with added tokens of every kind."""
    made = bpe(byte_level(CL100K))
    made.add_tokens(
        [
            AddedToken("\n\n\n", normalized=False),
            AddedToken("<table>", normalized=False),
            AddedToken("<tab", normalized=False),
            AddedToken("<left>", lstrip=True, normalized=False),
            AddedToken("<right>", rstrip=True, normalized=False),
            AddedToken("born", single_word=True, normalized=False),
        ]
    )
    made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return made


def added_normalized() -> Tokenizer:
    """Added tokens that are looked for in the normalized text."""
    made = bpe(byte_level(GPT2), normalizer=normalizers.Lowercase())
    made.add_tokens(["<Table>", "equal in", "ÉTÉ"])
    return made


MAKERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": gpt2,
    "roberta": roberta,
    "qwen": qwen,
    "o200k": o200k,
    "deepseek": deepseek,
    "llama3": llama3,
    "llama2": llama2,
    "llama2_added": llama2_added,
    "gemma": gemma,
    "metaspace_always": metaspace("always"),
    "metaspace_first": metaspace("first"),
    "unigram": unigram,
    "unigram_words": unigram_words,
    "bert": bert,
    "added": added,
    "added_normalized": added_normalized,
}


@cache
def zoo_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One of `MAKERS`, as transformers has it."""
    return PreTrainedTokenizerFast(tokenizer_object=MAKERS[name]())

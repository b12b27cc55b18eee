"""`graftlm generate`: continue a prompt, alone or beside what the parts would say."""

import argparse
import sys
from typing import Any

from graftlm.cli import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, prompt, and how to pick tokens."""
    parser.usage = "graftlm generate FOLDER [PROMPT] [options]"
    parser.add_argument("folder", metavar="FOLDER", help="a composed model")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="by default what stdin holds")
    parser.add_argument(
        "--compare", action="store_true", help="show the anchor and augmenting models beside it"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="write the prompt as a user's turn in a chat",
    )
    parser.add_argument(
        "--scale",
        action="append",
        metavar="NAME=X",
        help="multiply what is read from one augmenting model; 0 switches it off",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="where to stop (default: 128)"
    )
    group = parser.add_argument_group("sampling (any of these turns it on)")
    group.add_argument(
        "--temperature", type=float, metavar="X", help="above 1 is more random, below less"
    )
    group.add_argument("--top-p", type=float, metavar="X", help="likeliest tokens of this sum only")
    group.add_argument("--top-k", type=int, metavar="N", help="this many likeliest tokens only")
    group.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: 0)")
    options.add_models(parser, required=False)
    options.add_loading(parser)


def load(args: argparse.Namespace, **more: Any) -> Any:
    """The composed model of the folder, with the base models the flags name."""
    from graftlm.causal_lm import ComposedForCausalLM

    how = options.loading(args)
    return ComposedForCausalLM.from_pretrained(
        args.folder,
        anchor=args.anchor,
        augmenting=options.named(args.augmenting),
        quantization_config=how.pop("quantize", None),
        **how,
        **more,
    )


def run(args: argparse.Namespace) -> int:
    """Generate, and stream what comes."""
    prompt = read_prompt(args)
    import torch
    from transformers import set_seed

    model = load(args)
    for entry in args.scale or ():
        model.set_scale(*parse_scale(entry))
    if args.device_map is None and torch.cuda.is_available():
        model.to("cuda")
    tokenizer = load_tokenizer(args, model)
    inputs = encode(prompt, tokenizer, args.chat).to(model.device)
    settings = sampling(args) | {
        "max_new_tokens": args.max_new_tokens,
        "pad_token_id": first_known(tokenizer.pad_token_id, tokenizer.eos_token_id),
    }
    seed = args.seed or 0
    if args.compare:
        compare(model, tokenizer, prompt, settings, chat=args.chat, seed=seed)
        return 0
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    set_seed(seed)
    model.generate(**inputs, **settings, streamer=streamer)
    return 0


def read_prompt(args: argparse.Namespace) -> str:
    """The prompt given, or all of stdin.

    Raises:
        ValueError: If there is none.
    """
    if args.prompt is not None:
        return args.prompt
    if sys.stdin.isatty():
        raise ValueError("there is no prompt; write it behind the folder, or pipe it in")
    return sys.stdin.read().removesuffix("\n")


def parse_scale(entry: str) -> tuple[str, float]:
    """Name and factor.

    Raises:
        ValueError: If it is not NAME=NUMBER.
    """
    name, _, number = entry.partition("=")
    try:
        return name, float(number)
    except ValueError as exc:
        raise ValueError(
            f"--scale is {entry!r}, but must be NAME=NUMBER, such as code=0.5"
        ) from exc


def load_tokenizer(args: argparse.Namespace, model: Any) -> Any:
    """The tokenizer saved with the bridges, else the anchor's.

    Raises:
        ValueError: If there is neither.
    """
    from graftlm.tokenization import find_tokenizer

    for place in (args.folder, args.anchor, model.anchor.config.name_or_path):
        if found := find_tokenizer(place):
            return found
    raise ValueError(f"there is no tokenizer in {args.folder} nor beside the anchor")


def encode(prompt: str, tokenizer: Any, chat: bool) -> Any:
    """Token ids and mask of one prompt.

    Raises:
        ValueError: If the prompt is empty, or there is no chat template.
    """
    if chat:
        if not tokenizer.chat_template:
            raise ValueError("--chat needs a chat template, but the tokenizer has none")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    inputs = tokenizer(
        prompt, return_tensors="pt", add_special_tokens=not chat, return_token_type_ids=False
    )
    if not inputs["input_ids"].numel():
        raise ValueError("the prompt is empty, so there is nothing to continue")
    return inputs


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """Generation settings: greedy unless a sampling option was given."""
    chosen = options.given(args, "temperature", "top_p", "top_k")
    if chosen or args.seed is not None:
        return {"do_sample": True, **chosen}
    # Not what the anchor's files say: transformers warns of sampling settings in greedy search.
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def first_known(*values: int | None) -> int | None:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def compare(
    model: Any,
    tokenizer: Any,
    text: str,
    settings: dict[str, Any],
    *,
    chat: bool,
    seed: int,
) -> None:
    """Print what the anchor, each augmenting model and the composed model write, side by side."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text
    from transformers import set_seed

    from graftlm.cli.show import output

    def text_of(part: Any, theirs: Any = None) -> str:
        set_seed(seed)
        splitter, prompt, options = tokenizer, encode(text, tokenizer, chat), settings
        if theirs is not None:  # a model of other tokens reads the same text, in its own markup
            splitter, prompt = theirs, encode(text, theirs, chat and bool(theirs.chat_template))
            options = settings | {
                "pad_token_id": first_known(theirs.pad_token_id, theirs.eos_token_id)
            }
        ids = part.generate(**prompt.to(part.device), **options)[0]
        return splitter.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    others = {} if model.processor is None else model.processor.augmenting_tokenizers
    with model.anchor_only():
        texts = {"anchor": text_of(model)}
    texts |= {name: text_of(part, others.get(name)) for name, part in model.augmenting.items()}
    texts["composed"] = text_of(model)
    console = output()
    if not console.is_terminal:
        for name, text in texts.items():
            print(f"== {name} ==\n{text}\n")
        return
    width = max(24, console.width // len(texts) - 1)
    panels = [Panel(Text(text), title=name, width=width) for name, text in texts.items()]
    console.print(Columns(panels, padding=(0, 1)))

"""The tokenizers of a composed model: prepare text for all its models at once."""

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase

from graftlm.augmenting_tokens import AugmentingTokens, read_batch
from graftlm.chat import PLAIN_TEMPLATE, ChatFormat
from graftlm.checkpoint import read_config
from graftlm.collation import padding_collator
from graftlm.config import ComposedConfig
from graftlm.reading import IdentityReader, Reader, TextReader
from graftlm.states_cache import pad_states

FOLDER = "tokenizer_"  # in a checkpoint: one folder for each augmenting tokenizer


class ComposedProcessor:
    """Tokenizes for the anchor, and for the augmenting models whose tokenizers differ.

    A composed model needs the anchor's tokens only, and reads the rest itself. Preparing that
    here does the same work earlier, in the processes that load data.

    Args:
        tokenizer: The anchor's. Without a chat template it gets a plain one, if an augmenting
            model has one.
        augmenting_tokenizers: By name; only of models whose `alignments` are not "identity".
        config: Of the composed model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        augmenting_tokenizers: Mapping[str, PreTrainedTokenizerBase],
        config: ComposedConfig,
    ):
        if not tokenizer.chat_template and any(
            map(ChatFormat.written, augmenting_tokenizers.values())
        ):
            tokenizer = copy.deepcopy(tokenizer)
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer = tokenizer
        self.augmenting_tokenizers = dict(augmenting_tokenizers)
        self.reads_prompt = config.reads == "prompt"
        self.readers = make_readers(config, tokenizer, augmenting_tokenizers)

    @property
    def all_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """The tokenizers by part, "anchor" among them."""
        return {"anchor": self.tokenizer, **self.augmenting_tokenizers}

    def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding:
        """Tokenize texts for all models.

        Args:
            text: One or several.
            options: For the anchor's tokenizer, such as `padding=True`; tensors are returned.

        Returns:
            What the anchor's tokenizer returns, and `augmenting_inputs` where tokenizers differ;
            all of it fits `ComposedForCausalLM.forward` and `generate`.
        """
        texts = [text] if isinstance(text, str) else text
        options = {"return_tensors": "pt", "return_token_type_ids": False} | options
        encoded = self.tokenizer(texts, **options)
        return self.with_augmenting_inputs(encoded)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Messages as the anchor's chat template writes them.

        Args:
            conversation: Messages, or several lists of them.
            options: As in transformers; `tokenize=True` gives what a call of the processor gives.
        """
        if not options.get("tokenize", True):
            return self.tokenizer.apply_chat_template(conversation, **options)
        options = {"return_tensors": "pt", "return_dict": True, **options}
        encoded: Any = self.tokenizer.apply_chat_template(conversation, **options)
        return self.with_augmenting_inputs(encoded)

    def with_augmenting_inputs(self, encoded: Any) -> Any:
        """A batch of the anchor's tensors, and what the augmenting models read of it."""
        # What the model is told only in its forward pass, it reads there.
        told_later = self.reads_prompt or "read_ids" in encoded or "position_ids" in encoded
        if self.readers and not told_later:
            encoded["augmenting_inputs"] = self.read(
                encoded["input_ids"], encoded.get("attention_mask")
            )
        return encoded

    def read(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Tensor | None = None
    ) -> dict[str, AugmentingTokens]:
        """What the augmenting models of other tokenizers read of rows of anchor tokens.

        Args:
            input_ids: The anchor's tokens.
            attention_mask: (batch, seq), 1 for tokens to read, 0 for others, or None.
        """
        nothing = [None] * len(input_ids)
        return {
            name: read_batch(reader, nothing, input_ids, attention_mask)[0]
            for name, reader in self.readers.items()
        }

    def decode(self, tokens: Any, **options: Any) -> str:
        """Text of the anchor's tokens."""
        return self.tokenizer.decode(tokens, **options)  # pyrefly: ignore[bad-return]

    def batch_decode(self, sequences: Any, **options: Any) -> list[str]:
        """Texts of several rows of the anchor's tokens."""
        return self.tokenizer.batch_decode(sequences, **options)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Save the anchor's tokenizer, and each other in a folder of its own.

        Args:
            save_directory: Where to; `ComposedForCausalLM.save_pretrained` does this too.
            options: Ignored; what Trainer passes to processors.
        """
        del options
        self.tokenizer.save_pretrained(save_directory)
        for name, tokenizer in self.augmenting_tokenizers.items():
            tokenizer.save_pretrained(Path(save_directory, FOLDER + name))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        config: ComposedConfig | None = None,
        **hub_options: Any,
    ) -> Self:
        """The processor saved with a composed model.

        Args:
            pretrained_model_name_or_path: The folder, or a hub id.
            config: The configuration, if it was read before.
            hub_options: Such as `revision`, as in transformers.
        """
        place = os.fspath(pretrained_model_name_or_path)
        hub_options = {name: v for name, v in hub_options.items() if not name.startswith("_")}
        if config is None:
            config = read_config(place, **hub_options)
        subfolder = hub_options.pop("subfolder", "")
        others: Any = {
            name: AutoTokenizer.from_pretrained(
                place, subfolder="/".join(filter(None, (subfolder, FOLDER + name))), **hub_options
            )
            for name, alignment in config.alignments.items()
            if alignment != "identity"
        }
        tokenizer: Any = AutoTokenizer.from_pretrained(place, subfolder=subfolder, **hub_options)
        return cls(tokenizer, others, config)


def make_readers(
    config: ComposedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> dict[str, Reader]:
    """How each augmenting model reads that does not just take all the anchor's tokens.

    Args:
        config: Of the composed model.
        tokenizer: The anchor's, or None if it is not at hand.
        augmenting_tokenizers: By name, as far as they are at hand.
    """
    readers: dict[str, Reader] = {}
    num_tokens = config.vocab_size if tokenizer is None else len(tokenizer)
    for name, rule in config.alignments.items():
        size = config.augmenting_configs[name].get_text_config(decoder=True).vocab_size
        if rule == "identity":
            # Rows of the embedding that no token uses are no reason to look at every token.
            if size < min(num_tokens, config.vocab_size):
                readers[name] = IdentityReader(size)
        elif tokenizer is not None and name in augmenting_tokenizers:
            readers[name] = TextReader(tokenizer, augmenting_tokenizers[name], rule)
    return readers


class ComposedDataCollator:
    """Makes a batch of examples, for all models.

    Args:
        processor: Of the composed model.
    """

    def __init__(self, processor: ComposedProcessor):
        self.processor = processor
        self.pad = padding_collator(processor.tokenizer)

    def __call__(self, features: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad examples of `input_ids`, `labels` and perhaps others on the right.

        Args:
            features: Perhaps with `read_ids`, and with the `frozen_states` of a `StatesCache`.

        Returns:
            Tensors for `ComposedForCausalLM.forward`: `input_ids`, `attention_mask`, `labels`
            (-100 for padding), `augmenting_inputs` where tokenizers differ, and `frozen_states`.

        Raises:
            ValueError: If an example has another number of `read_ids` than of `input_ids`.
        """
        rows = [dict(feature) for feature in features]
        read_ids = [row.pop("read_ids", None) for row in rows]
        states = [row.pop("frozen_states") for row in rows if "frozen_states" in row]
        batch: dict[str, Any] = dict(self.pad(rows))
        if any(ids is not None for ids in read_ids):
            for number, (row, ids) in enumerate(zip(rows, read_ids, strict=True)):
                if ids is None or len(ids) != len(row["input_ids"]):
                    found = "none" if ids is None else len(ids)
                    raise ValueError(
                        f"example {number} of the batch has {len(row['input_ids'])} input_ids, but "
                        f"{found} read_ids; give as many to every example, or to none"
                    )
            batch["read_ids"] = torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(ids) for ids in read_ids], batch_first=True
            )
        batch = self.processor.with_augmenting_inputs(batch)
        if states:
            # Parts that share the anchor's tokens are as long as they.
            parts = {name.rpartition(".")[0] for name in states[0]} - set(self.processor.readers)
            lengths = dict.fromkeys(parts, batch["input_ids"].shape[1])
            batch["frozen_states"] = pad_states(states, lengths)
        return batch


AutoProcessor.register(ComposedConfig, ComposedProcessor, exist_ok=True)

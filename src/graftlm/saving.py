"""Save a composed model without its bases, and load it onto the same ones."""

import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graftlm import decoder
from graftlm.bases import (
    Base,
    check_base,
    fingerprint,
    for_augmenting,
    load_base,
    reference,
    role_of,
)
from graftlm.checkpoint import (
    PREFIX,
    bridge_weights,
    check_names,
    read_config,
    read_generation_config,
    read_weights,
    write_checkpoint,
)
from graftlm.composed import ComposedModel, ComposedPreTrainedModel
from graftlm.config import ComposedConfig
from graftlm.processor import ComposedProcessor, make_readers
from graftlm.quantized import quantization_for
from graftlm.tokenization import find_tokenizer, tokenizer_fingerprint


class SavesBridges(ComposedPreTrainedModel):
    """What `ComposedForCausalLM` does about files."""

    model: ComposedModel
    processor: ComposedProcessor | None

    def set_tokenizers(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        augmenting_tokenizers: Mapping[str, PreTrainedTokenizerBase],
    ) -> None:
        """Tell the model how its parts split text; `compose` and `from_pretrained` do this.

        Args:
            tokenizer: The anchor's.
            augmenting_tokenizers: By name; those of models that share its tokens are not needed.
        """
        others = {
            name: augmenting_tokenizers[name]
            for name, rule in self.config.alignments.items()
            if rule != "identity" and name in augmenting_tokenizers
        }
        self.model.readers = make_readers(self.config, tokenizer, others)
        self.processor = None
        if tokenizer is not None:
            self.processor = ComposedProcessor(tokenizer, others, self.config)
            self.model.readers = self.processor.readers

    def save_pretrained(  # pyrefly: ignore[bad-override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the bridges, the configuration and a model card; never a base weight.

        A new folder appears complete or not at all; files in an existing one are replaced one
        by one, each complete.

        Args:
            save_directory: Where to.
            is_main_process: False writes nothing, as in transformers.
            state_dict: A gathered state dict to take the bridges from.
            push_to_hub: Upload afterwards; `repo_id` and others as in transformers.
            safe_serialization: Must be True.
            kwargs: For `push_to_hub`.

        Raises:
            ValueError: If pickles are asked for, or the folder holds a model of another kind.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False, but graftlm writes safetensors only")
        self.take_fingerprints()
        if state_dict is None:
            # Not the full state_dict: gathering packed base weights can change them.
            state_dict = self.model.bridges.state_dict(prefix=PREFIX)
        if is_main_process:
            write_checkpoint(
                save_directory,
                self.config,
                bridge_weights(state_dict),
                self.generation_config,
                self.processor or find_tokenizer(self.model.anchor.config.name_or_path),
                self.num_parameters_by_part(),
            )
        if push_to_hub:
            kwargs.setdefault("repo_id", os.path.basename(os.path.abspath(save_directory)))
            self.push_to_hub(**kwargs)

    def take_fingerprints(self) -> None:
        """Hash the base models once; they are frozen, so once is enough."""
        bases = {"anchor": self.model.anchor, **self.model.augmenting}
        for name, base in bases.items():
            entry = self.config.bases.setdefault(name, {"name_or_path": None, "revision": None})
            tokenizer = self.tokenizer_of(name)
            if entry.get("fingerprint") is None:
                entry["fingerprint"] = fingerprint(
                    base, with_head=name == "anchor", tokenizer=tokenizer
                )
            elif tokenizer is not None:  # it may have been changed
                entry["fingerprint"]["tokenizer"] = tokenizer_fingerprint(tokenizer)

    def tokenizer_of(self, name: str) -> PreTrainedTokenizerBase | None:
        """The tokenizer to know one part again by.

        What matters is the one that text is read with. Where all models share their tokens that is
        nobody's business but the user's, and the one beside the model tells whether it changed.
        """
        base = self.model.anchor if name == "anchor" else self.model.augmenting[name]
        given = {} if self.processor is None else self.processor.all_tokenizers
        if name in given and given.keys() != {"anchor"}:
            return given[name]
        return find_tokenizer(base.config.name_or_path) or given.get(name)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: ComposedConfig | None = None,
        anchor: Base | None = None,
        augmenting: Base | Mapping[str, Base] | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        check_bases: bool = True,
        revision: str | None = None,
        subfolder: str = "",
        cache_dir: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> Self:
        """Load the bridges and the base models they were made for.

        Args:
            pretrained_model_name_or_path: A folder written by `save_pretrained`, or a hub id.
            config: The configuration, if it was read before.
            anchor: The anchor, loaded or elsewhere; by default where it was.
            augmenting: The augmenting model, or several by name; by default where they were.
            dtype, device_map, trust_remote_code, attn_implementation: For base models loaded
                here, as in transformers.
            quantization_config: As in `graftlm.compose`; by default the weights as they are in
                the files, also if the bridges were trained on quantized ones.
            check_bases: Compare configuration, weights and tokenizer of each base model with
                the checkpoint; the weights are read once more for that.
            revision, subfolder, cache_dir, token, local_files_only, force_download: For a
                composed model on the hub.
            kwargs: Refused, but for what transformers' Auto classes add; None is no argument.

        Raises:
            CheckpointMismatchError: If a file is missing or damaged, or a base model differs.
            ValueError: If a base model cannot be found.
            TypeError: If an argument is unknown.
        """
        asked = {name for name, value in kwargs.items() if value is not None}
        unknown = asked - {"_from_auto", "adapter_kwargs", "torch_dtype", "weights_only"}
        if unknown:
            raise TypeError(f"from_pretrained got unknown arguments: {', '.join(sorted(unknown))}")
        folder = os.fspath(pretrained_model_name_or_path)
        shared = {
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        hub_options = shared | {"revision": revision, "subfolder": subfolder}
        if config is None:
            config = read_config(folder, **hub_options)
        tensors = read_weights(folder, config, **hub_options)
        options = shared | {
            "dtype": kwargs.get("torch_dtype") or dtype,
            "device_map": device_map,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": attn_implementation,
        }
        names = list(config.augmenting_configs)
        packed = quantization_for(quantization_config, ["anchor", *names])
        given = {"anchor": anchor, **for_augmenting(augmenting, names, "augmenting")}
        processor = None
        if set(config.alignments.values()) != {"identity"}:
            processor = ComposedProcessor.from_pretrained(folder, config, **hub_options)
        loaded = {}
        for name in ("anchor", *config.augmenting_configs):
            role = role_of(name)
            known = config.bases.get(name, {})
            base = given.get(name) or known.get("name_or_path")
            if base is None:
                keyword = "anchor=" if name == "anchor" else "augmenting="
                raise ValueError(
                    f"{folder} does not say where {role} is, because it was composed from a "
                    f"loaded model; pass {keyword}"
                )
            at = {} if given.get(name) else {"revision": known.get("revision")}
            at |= {"quantization_config": packed.get(name)}
            is_anchor = name == "anchor"
            loaded[name] = load_base(base, role, **options, **at)
            if given.get(name) and reference(loaded[name]):
                known |= {"name_or_path": reference(loaded[name]), "revision": None}
            if not check_bases:
                known["fingerprint"] = None  # of another model, perhaps; taken anew when saving
            if check_bases:
                was = config.anchor_config if is_anchor else config.augmenting_configs[name]
                print_of = known.get("fingerprint")
                if print_of and config.format_version < 2:
                    print_of = {**print_of, "tokenizer": None}  # was taken in another way
                check_base(
                    loaded[name],
                    role,
                    was,
                    print_of,
                    with_head=is_anchor,
                    tokenizer=None if processor is None else processor.all_tokenizers.get(name),
                )
        anchor = loaded.pop("anchor")
        config.anchor_config = anchor.config
        config.augmenting_configs = {name: base.config for name, base in loaded.items()}
        config.check_connections()  # now that all layers are known
        model = cls(config, anchor, loaded)
        check_names(tensors, model.model.bridges.state_dict(prefix=PREFIX), folder)
        model.model.bridges.to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors, strict=False)
        model.config.name_or_path = folder
        generation_config = read_generation_config(folder, **hub_options)
        if generation_config is not None:
            model.generation_config = generation_config
        if processor is None:
            model.set_tokenizers(find_tokenizer(folder, subfolder), {})
        else:
            model.set_tokenizers(processor.tokenizer, processor.augmenting_tokenizers)
        return model

    def num_parameters_by_part(self) -> dict[str, int]:
        """Parameters of the anchor, of each augmenting model and of the bridges.

        Shared tensors count once; W^O of the bridges counts, which the paper leaves out.
        """
        parts = {
            "anchor": self.model.anchor,
            **self.model.augmenting,
            "bridges": self.model.bridges,
        }
        return {name: decoder.num_parameters(part) for name, part in parts.items()}

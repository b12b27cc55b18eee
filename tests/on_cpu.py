"""Run graftlm with FSDP2 or ZeRO-3 on CPU, as `accelerate launch` starts it on GPUs.

Without a GPU accelerate takes several processes for DDP, whatever they were asked to be. Nothing
else stands between its own code and gloo, so only that decision is changed here. Beside what
graftlm writes, each process notes which part of the model it held, and what became of the rest.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, trainer

from graftlm.bases import weights_hash
from graftlm.cli import main
from graftlm.sharding import num_elements


def spread_with_fsdp() -> None:
    """What `AcceleratorState` does about FSDP on GPUs."""
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = init


def talk_with_gloo() -> None:
    """DeepSpeed asks for the backend of a GPU."""
    backend = ("gloo", DistributedType.MULTI_CPU)
    PartialState._prepare_backend = lambda *args, **kwargs: backend


def num_local(parameter: Any) -> int:
    """Elements that are in this process."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


class Witness(TrainerCallback):
    """Notes at the end of training what this process saw."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        bases = {"anchor": model.model.anchor, **model.model.augmenting}
        seen = {
            "anchor": weights_hash(model.model.anchor, with_head=True),
            "whole": sum(num_elements(p) for base in bases.values() for p in base.parameters()),
            "local": sum(num_local(p) for base in bases.values() for p in base.parameters()),
            "bridges_local": sum(map(num_local, model.model.bridges.parameters())),
        }
        name = f"witness-{args.process_index}.json"
        Path(args.output_dir, name).write_text(json.dumps(seen))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        spread_with_fsdp()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        talk_with_gloo()
    vars(trainer)["DEFAULT_CALLBACKS"] = [*trainer.DEFAULT_CALLBACKS, Witness]
    sys.exit(main())

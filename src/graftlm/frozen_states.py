"""What training never changes: hidden states to compute once, and the anchor run from there up.

Both models are frozen. So for a given text the hidden states of the augmenting models are
constants, and so are those of the anchor at its first connected layer, before the bridges there.
Given them, a pass runs neither the augmenting models nor the anchor's layers below.

They are named "anchor.J" and "NAME.I": the part and the layer they come out of.
"""

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from graftlm import decoder
from graftlm.passes import RECORDING, ForwardPass, find_pass, write_hook

if TYPE_CHECKING:
    from graftlm.composed import ComposedModel


def connected_layers(model: "ComposedModel") -> dict[str, list[int]]:
    """The layers whose output is frozen, by part: the anchor's first, and all that are read."""
    connections = model.config.connections
    layers = {"anchor": [min(c.anchor_layer for c in connections)]}
    for name in model.augmenting:
        layers[name] = sorted({c.augmenting_layer for c in connections if c.augmenting == name})
    return layers


# ---- using them --------------------------------------------------------------------------


def take_states(
    model: "ComposedModel",
    forward_pass: ForwardPass,
    name: str,
    given: Mapping[str, Tensor],
    shape: torch.Size,
    num_read: int | None = None,
) -> None:
    """Put the given hidden states of one part where its hooks would have put them.

    Args:
        model: The composed model.
        forward_pass: The pass.
        name: "anchor", or an augmenting model.
        given: By name.
        shape: Rows, and tokens of this part.
        num_read: How many of the tokens are read; by default all.

    Raises:
        ValueError: If some are missing or have another shape.
    """
    part = model.anchor if name == "anchor" else model.augmenting[name]
    for layer in connected_layers(model)[name]:
        key, expected = f"{name}.{layer}", (*shape, decoder.hidden_size(part))
        if key not in given:
            raise ValueError(
                f"frozen_states has no {key!r}, only {', '.join(given) or 'nothing'}; they were "
                "computed for other connections"
            )
        if tuple(given[key].shape) != expected:
            raise ValueError(
                f"frozen_states[{key!r}] has shape {tuple(given[key].shape)}, but this batch needs "
                f"{expected}; they were computed for other tokens"
            )
        forward_pass.states[name, layer] = given[key][:, :num_read]


def entering_view(model: "ComposedModel", part: PreTrainedModel) -> PreTrainedModel:
    """The anchor, or its trunk, as it is run above hidden states that are given.

    The layers up to the first connected one are replaced by stand-ins, so that everything else
    (embeddings, masks, positions, the numbers of the layers, the head) is the anchor's own code.
    The anchor itself is not changed.

    Raises:
        ValueError: If somebody has bound another `forward` to the anchor.
    """
    trunk = decoder.trunk(part)
    path = next(name for name, module in part.named_modules() if module is trunk)
    parts = [*part.children(), *trunk.children(), *decoder.layer_list(part)]
    known, view = model.entering_views.get(path, ([], None))
    is_same = len(known) == len(parts) and all(map(operator.is_, known, parts))
    if view is not None and is_same:
        return view
    if not (decoder.can_be_viewed(part) and decoder.can_be_viewed(trunk)):
        raise ValueError(
            f"frozen_states cannot be used with this {type(part).__name__}, whose forward has been "
            "replaced; use the model as transformers loads it"
        )
    (first,) = connected_layers(model)["anchor"]
    layers = list(decoder.layer_list(part))
    stand_ins = [
        FrozenLayer(layer, model, index if index == first else None)
        for index, layer in enumerate(layers[: first + 1])
    ]
    shortcut = decoder.view_of(trunk)
    setattr(
        shortcut, decoder.layer_list_name(part), nn.ModuleList([*stand_ins, *layers[first + 1 :]])
    )
    entering = with_submodule(part, path.split(".") if path else [], shortcut)
    model.entering_views[path] = parts, entering
    return entering


def layer_output(model: "ComposedModel") -> tuple[type, int]:
    """What the anchor's layers return: a tuple or list of so many things, or (length 0) a tensor.

    Found by running one token, once.
    """
    if model.layer_output is None:
        token = torch.zeros(1, 1, dtype=torch.long)
        forward_pass = ForwardPass(model.hooks.key, model, None)
        record_anchor(model, forward_pass, token, None)
        model.layer_output = forward_pass.layer_output
    assert model.layer_output is not None
    return model.layer_output


def record_anchor(
    model: "ComposedModel", forward_pass: ForwardPass, input_ids: Tensor, attention_mask: Any
) -> None:
    """Run the anchor up to its first connected layer, and keep what comes out of it."""
    (first,) = connected_layers(model)["anchor"]
    view = decoder.shorten(model.anchor, first + 1)
    arguments = decoder.call_arguments(
        view, attention_mask=attention_mask, query_length=input_ids.shape[1], cache=None
    )
    forward_pass.running = RECORDING
    was_training = model.training
    model.train(False)  # else layers would be checkpointed, for a backward pass that never comes
    try:
        with forward_pass, torch.no_grad():
            view(input_ids=input_ids.to(model.device), **arguments)
    finally:
        model.train(was_training)


def with_submodule(module: Any, path: list[str], replacement: Any) -> Any:
    """A copy of a module in which the one at `path` is replaced."""
    if not path:
        return replacement
    view = decoder.view_of(module)
    setattr(view, path[0], with_submodule(getattr(module, path[0]), path[1:], replacement))
    return view


class FrozenLayer(nn.Module):
    """Stands in for an anchor layer that need not run.

    Args:
        layer: The layer; asked for whatever attributes the anchor's code wants of it.
        model: The composed model.
        number: Of the layer whose hidden states are given; None for those below it, whose
            output nobody looks at.
    """

    def __init__(self, layer: nn.Module, model: "ComposedModel", number: int | None):
        super().__init__()
        vars(self)["stands_for"] = layer  # not as a part of this module
        self.number = number
        self.key = model.hooks.key
        self.returns = layer_output(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["stands_for"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand on what is known."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if self.number is None:
            return self.output(hidden_states)
        forward_pass = find_pass(self.key, "anchor")
        assert forward_pass is not None
        known = forward_pass.states["anchor", self.number]
        output = self.output(known.to(hidden_states.device, hidden_states.dtype))
        return write_hook(self, args, output, key=self.key, layer=self.number)

    def output(self, hidden_states: Tensor) -> Any:
        """Hidden states as this kind of layer returns them; nothing else is known."""
        kind, length = self.returns
        return kind((hidden_states, *[None] * (length - 1))) if length else hidden_states

"""One forward pass in flight, and the hooks through which it reads and writes hidden states.

Hooks stay registered on the layers, because `torch.compile` cannot trace their registration, but
they act only while a pass of their own composed model runs in their own thread. Called on its
own, the anchor is untouched. A hook knows a key and a layer number; the pass knows the model, so
copies and replicas of a composed model use their own bridges.
"""

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graftlm.augmenting_tokens import AugmentingTokens
from graftlm.collation import IGNORED
from graftlm.decoder import hidden_states_of, with_hidden_states

T = TypeVar("T")

RECORDING = "recording"  # what "runs" in a pass that keeps the anchor's hidden states, unbridged


@runtime_checkable
class Bridged(Protocol):
    """What a pass asks of the composed model it runs."""

    def apply_bridges(
        self, forward_pass: "ForwardPass", layer: int, hidden_states: Tensor
    ) -> Tensor:
        """The hidden states after the bridges of one anchor layer."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PassInputs:
    """What one forward pass is given about its tokens; see `ComposedForCausalLM.forward`."""

    input_ids: Int[Tensor, "batch seq"] | None
    attention_mask: Tensor | dict[str, Tensor | None] | None = None
    position_ids: Int[Tensor, "#batch seq"] | None = None
    prompt_mask: Int[Tensor, "batch prompt_seq"] | None = None
    read_ids: Int[Tensor, "batch seq"] | None = None
    augmenting_inputs: Mapping[str, AugmentingTokens] | None = None
    frozen_states: Mapping[str, Tensor] | None = None
    observed: "Observed | None" = None

    @property
    def tokens_to_read(self) -> Int[Tensor, "batch seq"]:
        """The anchor tokens that the augmenting models read.

        Raises:
            ValueError: If `read_ids` does not have the shape of `input_ids`.
        """
        assert self.input_ids is not None
        if self.read_ids is None:
            return self.input_ids
        if self.read_ids.shape != self.input_ids.shape:
            raise ValueError(
                f"read_ids has shape {tuple(self.read_ids.shape)}, but must have that of "
                f"input_ids, {tuple(self.input_ids.shape)}: a token to read for each token"
            )
        return self.read_ids

    def columns_to_read(self, past: int, *, prompt_only: bool = False) -> Tensor | None:
        """(batch, seq), 1 where there is something to read behind `past` cached tokens.

        Args:
            past: Tokens in the cache.
            prompt_only: Whether only the prompt is read; without a mask of it, a first call is
                the prompt and later ones are not.
        """
        ids = self.tokens_to_read
        end = past + ids.shape[1]
        wanted = None
        masks = [(part_of(self.attention_mask, "tokens"), 1), (self.prompt_mask, 0)]
        for mask, beyond in masks:
            if mask is not None:
                missing = max(end - mask.shape[1], 0)
                columns = nn.functional.pad(mask.long(), (0, missing), value=beyond)[:, past:end]
                wanted = columns if wanted is None else wanted * columns
        if prompt_only and self.prompt_mask is None and past:
            return torch.zeros_like(ids)
        return wanted


@dataclass(eq=False, slots=True)
class Observed:
    """What the bridges do in one pass without a cache, for whoever asks (see `explain`).

    Args:
        attention: (batch, heads, seq, aug_seq) by connection; 0 where nothing is visible.
        update_share: (batch, seq) by connection: norm of the update, scale included, over the
            norm of the hidden states it is added to.
    """

    attention: dict[int, Tensor] = field(default_factory=dict)
    update_share: dict[int, Tensor] = field(default_factory=dict)

    def recorder(self, connection: int, any_visible: Tensor | None) -> Callable[[Tensor], None]:
        """Keeps the weights of one connection, but for rows whose update is dropped."""

        def record(weights: Tensor) -> None:
            assert connection not in self.attention, "without a cache there is one block only"
            if any_visible is not None:
                weights = weights.masked_fill(~any_visible[:, None].to(weights.device), 0.0)
            self.attention[connection] = weights

        return record

    def add_update(self, connection: int, hidden_states: Tensor, update: Tensor) -> None:
        """Measure what one connection adds."""
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        norms = [x.to(wide).norm(dim=-1) for x in (update, hidden_states)]
        # A hidden state of zero has no share; NaN would be no number in a file.
        self.update_share[connection] = norms[0] / norms[1].clamp_min(torch.finfo(wide).tiny)


@dataclass(eq=False, slots=True)
class ForwardPass:
    """What lives from the begin to the end of one forward pass, and no longer.

    Args:
        key: Of the composed model; hooks of other models stay silent.
        model: Whose bridges apply.
        running: Name of the augmenting model that runs now, or "anchor".
        states: Captured or given hidden states, by part and layer.
        plan: What the bridges of each augmenting model need; filled in by the model.
        cache: The composed cache, or None.
        bridged: How many anchor layers have been bridged.
        layer_output: In a recording pass: what an anchor layer returns; see `layer_output`.
        observed: Where to keep what the bridges do, if anybody asked.
    """

    key: str
    model: Bridged
    cache: Any
    running: str = ""
    states: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    bridged: int = 0
    layer_output: tuple[type, int] | None = None
    observed: Observed | None = None

    def __enter__(self) -> "ForwardPass":
        passes.set((*passes.get(), self))
        return self

    def __exit__(self, *exc: object) -> None:
        passes.set(passes.get()[:-1])


def part_of(masks: Any, name: str) -> Any:
    """One part's mask: the tensor that all share, or its own of `create_masks_for_generate`."""
    if not isinstance(masks, dict):
        return masks
    own = {
        kind.removeprefix(f"{name}/"): mask
        for kind, mask in masks.items()
        if kind.startswith(f"{name}/")
    }
    return own[""] if set(own) == {""} else own


def prompt_of(
    labels: Int[Tensor, "batch seq"], segments: Int[Tensor, "batch seq"] | None = None
) -> Int[Tensor, "batch seq"]:
    """1 for the tokens before the first label, which are the prompt of `reads="prompt"`.

    Args:
        labels: Targets.
        segments: The number of each token's packed document, which has a prompt of its own.
    """
    is_label = (labels != IGNORED).long()
    count = is_label.cumsum(-1)
    if segments is None:
        return (count == 0).long()
    begins = torch.diff(segments, prepend=segments[:, :1] - 1, dim=-1) != 0
    before = torch.where(begins, count - is_label, 0).cummax(-1).values  # in earlier documents
    return (count == before).long()


class Scoped(Generic[T]):
    """A value each thread has for itself, readable from code that `torch.compile` traces.

    Dynamo cannot trace a ContextVar. A layer that is compiled on its own reads what eager code
    around it wrote, so eager code writes both places.
    """

    def __init__(self, default: T):
        self.per_thread: ContextVar[T] = ContextVar("graftlm", default=default)
        self.traced = default

    def get(self) -> T:
        """The value here and now."""
        if torch.compiler.is_dynamo_compiling():
            return self.traced
        return self.per_thread.get()

    def set(self, value: T) -> None:
        """Replace it for this thread."""
        if not torch.compiler.is_dynamo_compiling():
            self.per_thread.set(value)
        self.traced = value

    def show(self) -> None:
        """Let traced code that this thread runs next read this thread's value."""
        if not torch.compiler.is_dynamo_compiling():
            self.traced = self.per_thread.get()


passes: Scoped[tuple[ForwardPass, ...]] = Scoped(())  # in flight, innermost last
# Composed models of which only the anchor counts, by their `scope_key`, as below.
anchor_only_keys: Scoped[frozenset[str]] = Scoped(frozenset())
# Connections that add nothing: the key of their model, and their index.
connections_off: Scoped[frozenset[tuple[str, int]]] = Scoped(frozenset())
# Scales that replace those of the configuration, by the key of the model and a name.
scales_here: Scoped[Mapping[tuple[str, str], float]] = Scoped({})


def show_scopes() -> None:
    """Let compiled code read what this thread switched, whatever other threads did since."""
    for scope in (anchor_only_keys, connections_off, scales_here):
        scope.show()


def find_pass(key: str, running: str) -> ForwardPass | None:
    """The innermost pass, if it is of this composed model and runs this part of it."""
    in_flight = passes.get()
    if in_flight and in_flight[-1].key == key and in_flight[-1].running == running:
        return in_flight[-1]
    return None


def write_hook(module: nn.Module, args: Any, output: Any, *, key: str, layer: int) -> Any:
    """After an anchor layer: add what the bridges read."""
    recording = find_pass(key, RECORDING)
    if recording is not None:
        recording.states["anchor", layer] = hidden_states_of(output, type(module).__name__)
        several = isinstance(output, (tuple, list))
        recording.layer_output = type(output), len(output) if several else 0
    forward_pass = find_pass(key, "anchor")
    if forward_pass is None:
        return None
    forward_pass.bridged += 1
    hidden_states = hidden_states_of(output, type(module).__name__)
    hidden_states = forward_pass.model.apply_bridges(forward_pass, layer, hidden_states)
    return with_hidden_states(output, hidden_states)


def read_hook(
    module: nn.Module, args: Any, output: Any, *, key: str, layer: int, name: str
) -> None:
    """After an augmenting layer: keep its hidden states for the bridges."""
    forward_pass = find_pass(key, name)
    if forward_pass is not None:
        forward_pass.states[name, layer] = hidden_states_of(output, type(module).__name__)


class Hooks:
    """The registered hooks of one composed model, each on the layer that is run now.

    Wrappers such as activation checkpointing or a per-layer `torch.compile` replace entries of
    the list of layers; a hook left below them would run again in the backward pass.
    """

    def __init__(self, key: str):
        self.key = key
        self.handles: dict[tuple[str, int], RemovableHandle] = {}
        self.modules: dict[tuple[str, int], nn.Module] = {}

    def attach(self, name: str, layers: nn.ModuleList, indices: list[int]) -> None:
        """Make sure that the given layers of one model carry their hooks."""
        for index in indices:
            layer, place = layers[index], (name, index)
            if self.modules.get(place) is layer:
                continue
            if place in self.handles:
                self.handles[place].remove()
            # Prepended, so that recorded hidden states are those after the bridges.
            self.handles[place] = layer.register_forward_hook(self.hook(name, index), prepend=True)
            self.modules[place] = layer

    def hook(self, name: str, index: int) -> Callable[..., Any]:
        """The hook of one layer; it can be copied and pickled with the layer."""
        if name == "anchor":
            return functools.partial(write_hook, key=self.key, layer=index)
        return functools.partial(read_hook, key=self.key, layer=index, name=name)

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self.handles.values():
            handle.remove()
        self.handles.clear()
        self.modules.clear()

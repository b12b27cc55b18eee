"""The bridge: all that CALM trains. Knows tensors, not models.

One bridge joins layer i of an augmenting model to layer j of the anchor (CALM, section 3.1):

    K = f_proj(H_Ai) W^K    V = f_proj(H_Ai) W^V    Q = H_Bj W^Q
    f_cross = Concat_k(softmax(Q_k K_k^T / sqrt(d)) V_k) W^O
    H_{A+B,j} = H_Bj + f_cross(f_proj(H_Ai), H_Bj)          the input of anchor layer j + 1

Where the paper is silent, `BridgeConfig` says what we do and `docs/paper.md` says why.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Real
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from graftlm.config import BridgeConfig


class Bridge(GradientCheckpointingLayer):
    """Projection and cross-attention of one connection.

    A fresh bridge adds exactly nothing: W^O (or the gate) starts at zero. That start is ours; the
    paper names none.

    Args:
        anchor_size: D_B, width of the anchor's hidden states.
        augmenting_size: D_A, width of the augmenting model's hidden states.
        config: A resolved `BridgeConfig`.
        index: Place of this bridge among the bridges of its composition; its cache layer.
    """

    def __init__(self, anchor_size: int, augmenting_size: int, config: BridgeConfig, index: int):
        super().__init__()
        config = config.resolve(anchor_size, anchor_heads=1)
        assert config.num_heads is not None
        assert config.width is not None
        self.index = index
        self.num_heads = config.num_heads
        self.head_dim = config.width // config.num_heads
        self.position = config.position
        self.norm = config.norm
        self.query_norm = InputNorm(anchor_size) if config.norm else nn.Identity()
        self.read_norm = InputNorm(augmenting_size) if config.norm else nn.Identity()
        # The names differ from q_proj, k_proj, ... so that PEFT's usual targets miss them.
        self.proj = nn.Linear(augmenting_size, anchor_size, bias=config.bias)
        self.cross_q = nn.Linear(anchor_size, config.width, bias=config.bias)
        self.cross_k = nn.Linear(anchor_size, config.width, bias=config.bias)
        self.cross_v = nn.Linear(anchor_size, config.width, bias=config.bias)
        self.cross_o = nn.Linear(config.width, anchor_size, bias=config.bias)
        self.gate = nn.Parameter(torch.zeros(())) if config.gate else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights: every map keeps unit variance, and the update starts at zero."""
        for linear in (self.proj, self.cross_q, self.cross_k, self.cross_v, self.cross_o):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.gate is None:
            nn.init.zeros_(self.cross_o.weight)  # with a gate, zero here too would never train
        else:
            nn.init.zeros_(self.gate)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch seq d_anchor"],
        augmenting_states: Float[Tensor, "batch new_seq d_aug"] | None,
        cross_mask: Bool[Tensor, "#batch 1 seq aug_seq"]
        | Float[Tensor, "#batch heads seq aug_seq"]
        | None = None,
        query_positions: Real[Tensor, "#batch seq"] | None = None,
        key_positions: Real[Tensor, "#batch new_seq"] | None = None,
        past_key_values: Cache | None = None,
        record: Callable[[Tensor], None] | None = None,
    ) -> Float[Tensor, "batch seq d_anchor"]:
        """The update f_cross: what the anchor's hidden states read from one augmenting layer.

        The caller adds it to `hidden_states`; several bridges at one layer add up.

        Args:
            hidden_states: H_Bj.
            augmenting_states: H_Ai of the tokens that are not in the cache yet; None reads only
                what the cache holds.
            cross_mask: True where a position may read, or a float tensor that is added to the
                attention scores; it may leave out the last keys. None is plain causal attention
                if all keys are new, and reads every key otherwise.
            query_positions, key_positions: Positions in tokens, used by "rotary".
            past_key_values: The cache of all bridges; this bridge owns layer `index`.
            record: Called with the attention weights, which are not computed otherwise.
        """
        dtype = self.cross_q.weight.dtype
        query = self.heads(self.cross_q(self.query_norm(hidden_states).to(dtype)))
        if augmenting_states is None:
            assert past_key_values is not None
            cached: Any = past_key_values.layers[self.index]
            keys, values = cached.keys, cached.values
        else:
            keys, values = self.read(augmenting_states.to(hidden_states.device), key_positions)
            if past_key_values is not None:
                keys, values = past_key_values.update(keys, values, self.index)
        if self.position == "rotary":
            query = rotate(query, query_positions)
        # Without a mask a single query reads all keys; several queries are a first, causal pass.
        is_causal = cross_mask is None and query.shape[2] > 1
        if cross_mask is not None:
            kind = query.dtype if cross_mask.is_floating_point() else torch.bool
            cross_mask = cross_mask.to(query.device, kind)
            seen = cross_mask.shape[-1]
            keys, values = keys[:, :, :seen], values[:, :, :seen]
        read = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=cross_mask, is_causal=is_causal
        )
        if record is not None:
            record(attention_weights(query, keys, cross_mask, is_causal))
        update = self.cross_o(read.transpose(1, 2).flatten(2))  # (batch, seq, d_anchor)
        if self.gate is not None:
            update = update * self.gate.tanh()
        if self.norm:
            update = update * typical_size(hidden_states)
        return update.to(hidden_states.dtype)

    def read(
        self,
        augmenting_states: Float[Tensor, "batch new_seq d_aug"],
        key_positions: Real[Tensor, "#batch new_seq"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch heads new_seq head_dim"], Float[Tensor, "batch heads new_seq head_dim"]
    ]:
        """Keys and values of the augmenting states: f_proj, then W^K and W^V."""
        projected = self.proj(self.read_norm(augmenting_states).to(self.proj.weight.dtype))
        keys, values = self.heads(self.cross_k(projected)), self.heads(self.cross_v(projected))
        return (rotate(keys, key_positions) if self.position == "rotary" else keys), values

    def heads(
        self, x: Float[Tensor, "batch seq width"]
    ) -> Float[Tensor, "batch heads seq head_dim"]:
        """Split the last axis into heads."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def attention_weights(
    query: Float[Tensor, "batch heads seq head_dim"],
    keys: Float[Tensor, "batch heads aug_seq head_dim"],
    cross_mask: Tensor | None,
    is_causal: bool,
) -> Float[Tensor, "batch heads seq aug_seq"]:
    """The weights by which fused attention sums the values, in float32 at least.

    The fused kernels do not give them away, so they are computed beside them, from what they get.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ keys.to(wide).transpose(-2, -1) * query.shape[-1] ** -0.5
    if is_causal:
        cross_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if cross_mask is not None and cross_mask.dtype == torch.bool:
        scores = scores.masked_fill(~cross_mask, -math.inf)
    elif cross_mask is not None:
        scores = scores + cross_mask
    return scores.softmax(-1)


class InputNorm(nn.Module):
    """RMSNorm that leaves its input's range: computed in float32 at least.

    Hidden states of real models exceed what float16 can hold (Gemma: 104,000), so they are
    normalised before they are cast to the bridge's dtype.
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Float[Tensor, "batch seq size"]) -> Float[Tensor, "batch seq size"]:
        """Normalise the last axis to unit root mean square, then scale it by the weight."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), eps=1e-6)


def typical_size(x: Float[Tensor, "batch seq size"]) -> Float[Tensor, "batch seq 1"]:
    """Size of each hidden state, in float32 at least: the unit of a normalised bridge's update.

    The median of its channels, times what makes it the root mean square of normal numbers. Real
    models hold a few giant channels (at the first token of SmolLM2 the root mean square is 1042,
    elsewhere 5 to 8), which would otherwise be the unit of that token, and most of the gradient.

    A unit is not learned from: no gradient flows through it. Without it one learning rate would
    overwhelm an anchor whose states are small and not move one whose states are large; within
    one small model they grew 10-fold from first to last layer.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return 1.4826 * x.detach().to(wide).abs().median(-1, keepdim=True).values


def distance_slopes(num_heads: int) -> list[float]:
    """Slope of the distance bias per head, in units of the attention score per token.

    The first quarter of the heads is free of it and reaches anywhere; the others fall from 8,
    which reads hardly anything but the token itself, to 1/2, which reads a few words back.
    """
    free = num_heads // 4
    biased = num_heads - free
    return [0.0] * free + [2.0 ** (3 - 4 * k / max(biased - 1, 1)) for k in range(biased)]


def distance_bias(
    num_heads: int,
    query_positions: Real[Tensor, "#batch seq"],
    key_positions: Real[Tensor, "#batch aug_seq"],
    visible: Bool[Tensor, "#batch seq aug_seq"],
) -> Float[Tensor, "#batch heads seq aug_seq"]:
    """What "distance" adds to the scores: minus slope times how far back a key lies.

    Keys that are not visible get the least number instead. All in one pass over the result, which
    is the largest tensor there is.
    """
    back = (query_positions[:, :, None] - key_positions[:, None, :]).float()
    slopes = torch.tensor(distance_slopes(num_heads), device=back.device)
    hidden = torch.zeros_like(back).masked_fill(~visible, torch.finfo(back.dtype).min)
    return torch.addcmul(hidden[:, None], slopes[:, None, None], back[:, None], value=-1)


def rotate(
    x: Float[Tensor, "batch heads seq head_dim"], positions: Real[Tensor, "#batch seq"] | None
) -> Float[Tensor, "batch heads seq head_dim"]:
    """Turn pairs of channels by angles that grow with the position (rotary embedding)."""
    assert positions is not None
    half = x.shape[-1] // 2
    rates = torch.arange(half, device=x.device, dtype=torch.float32) / half
    turns = torch.exp(-math.log(10_000.0) * rates)
    angles = (
        positions.to(x.device, torch.float32)[:, None, :, None] * turns
    )  # (batch, 1, seq, half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

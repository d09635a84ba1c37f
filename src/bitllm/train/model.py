"""The decoder in PyTorch, for training: the same switches as `bitllm.checkpoint.LayerSpec`.

Parameters carry the names of the Hugging Face `bitnet` format, so that exporting is a walk over the
state. Everything runs in the dtype of the parameters, float32 as a rule.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitllm.checkpoint import Activation, LayerSpec, LinearSpec, ModelSpec
from bitllm.errors import UnsupportedModelError
from bitllm.train.bitlinear import BitLinear

__all__ = ["UNTRAINED", "TernaryDecoder", "token_loss"]

UNTRAINED = -100
"""The target of a token that is not to be learned."""

_PROJECTION_STD = 0.02


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, with a learned gain [size]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., size], in the dtype of the gain."""
        return functional.rms_norm(
            x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps
        )


class Projection(BitLinear):
    """One ternary projection of a layer, with an input norm of its own where the spec has one."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__(
            spec.in_features,
            spec.out_features,
            bias=spec.bias,
            activation_bits=spec.activation_bits,
            norm_eps=spec.norm_eps,
        )
        nn.init.normal_(self.weight, std=_PROJECTION_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def _norm_if(wanted: bool, size: int, eps: float) -> nn.Module:
    return RMSNorm(size, eps) if wanted else nn.Identity()


def _activate(name: Activation, x: Tensor) -> Tensor:
    if name == "relu2":
        return functional.relu(x).square()
    if name == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh")


class Attention(nn.Module):
    """Causal self-attention with grouped key and value heads."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.q_proj = Projection(spec.q)
        self.k_proj = Projection(spec.k)
        self.v_proj = Projection(spec.v)
        self.o_proj = Projection(spec.o)
        self.q_norm = _norm_if(spec.qk_norm, spec.head_dim, spec.norm_eps)
        self.k_norm = _norm_if(spec.qk_norm, spec.head_dim, spec.norm_eps)
        self.attn_sub_norm = _norm_if(spec.attn_sub_norm, spec.o.in_features, spec.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> Tensor:
        """Attend within [batch, time, hidden].

        Args:
            x: the input.
            cos: [time, rope dim / 2].
            sin: as `cos`.
            documents: numbers of the documents that tokens belong to, [batch, time]; tokens see
                those of their own only. None = all are of one.
        """
        q = self._heads(self.q_proj(x), self.q_norm)
        k = self._heads(self.k_proj(x), self.k_norm)
        v = self._heads(self.v_proj(x), nn.Identity())
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        mask = self._mask(x.shape[1], x.device, documents)
        attended = functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.spec.query_scale,
            enable_gqa=self.spec.num_heads != self.spec.num_kv_heads,
        )
        merged = attended.transpose(1, 2).flatten(2)
        projected: Tensor = self.o_proj(self.attn_sub_norm(merged))
        return projected

    def _heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """[batch, time, heads * head_dim] -> [batch, heads, time, head_dim]."""
        split: Tensor = norm(x.reshape(*x.shape[:-1], -1, self.spec.head_dim))
        return split.transpose(1, 2)

    def _mask(self, time: int, device: torch.device, documents: Tensor | None) -> Tensor | None:
        """Who sees whom, bool [time, time] or [batch, 1, time, time]; None for plain causal."""
        window = self.spec.sliding_window
        narrow = window is not None and window < time
        if not narrow and documents is None:
            return None
        distance = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)
        mask = distance >= 0
        if window is not None and narrow:
            mask = mask & (distance < window)
        if documents is not None:
            mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
        return mask


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half position embedding over the first 2 * cos.shape[-1] dimensions of each head."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


class FeedForward(nn.Module):
    """Gated feed-forward network: down(sub_norm(act(gate(x)) * up(x)))."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.activation = spec.activation
        self.gate_proj = Projection(spec.gate)
        self.up_proj = Projection(spec.up)
        self.down_proj = Projection(spec.down)
        self.ffn_sub_norm = _norm_if(spec.ffn_sub_norm, spec.down.in_features, spec.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., hidden] to [..., hidden]."""
        gated = _activate(self.activation, self.gate_proj(x)) * self.up_proj(x)
        projected: Tensor = self.down_proj(self.ffn_sub_norm(gated))
        return projected


class DecoderLayer(nn.Module):
    """Attention and feed-forward network, each with its norms and residual add."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        hidden, eps = spec.q.in_features, spec.norm_eps
        self.rope = spec.rope
        self.input_layernorm = _norm_if(spec.attn_norm, hidden, eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = _norm_if(spec.ffn_norm, hidden, eps)
        self.mlp = FeedForward(spec)
        self.attn_output_norm = _norm_if(spec.post_norms, hidden, eps)
        self.ffn_output_norm = _norm_if(spec.post_norms, hidden, eps)
        frequencies = torch.from_numpy(spec.rope.inverse_frequencies())
        self.inverse_frequencies: Tensor
        self.register_buffer("inverse_frequencies", frequencies, persistent=False)

    def forward(self, h: Tensor, documents: Tensor | None = None) -> Tensor:
        """Map [batch, time, hidden] to [batch, time, hidden]; `documents` as for `Attention`."""
        positions = torch.arange(h.shape[1], device=h.device, dtype=torch.float32)
        angles = positions[:, None] * self.inverse_frequencies
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        attended = self.self_attn(self.input_layernorm(h), cos, sin, documents)
        h = h + self.attn_output_norm(attended)
        fed = self.mlp(self.post_attention_layernorm(h))
        out: Tensor = h + self.ffn_output_norm(fed)
        return out


class _Body(nn.Module):
    """Everything below the head; exists so that parameter names start with `model.`."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(layer) for layer in spec.layers)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps)


class TernaryDecoder(nn.Module):
    """A ternary language model to train.

    Args:
        spec: the architecture.

    Raises:
        UnsupportedModelError: the architecture pools instead of predicting tokens.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        if spec.pooling != "none":
            raise UnsupportedModelError(
                f"a model that pools ({spec.pooling!r}) is not trained here"
            )
        self.spec = spec
        self.model = _Body(spec)
        nn.init.normal_(self.model.embed_tokens.weight, std=_PROJECTION_STD)
        self.lm_head: nn.Linear | None = None
        if not spec.tied_head:
            self.lm_head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False)
            nn.init.normal_(self.lm_head.weight, std=_PROJECTION_STD)

    def forward(self, token_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return logits [batch, time, vocab].

        Args:
            token_ids: int64 [batch, time].
            documents: numbers of the documents that tokens belong to, [batch, time]; tokens see
                those of their own only. None = all are of one. Positions go on from document to
                document: rotary embeddings know distances only.
        """
        h = self.model.embed_tokens(token_ids) * self.spec.embedding_scale
        for layer in self.model.layers:
            h = layer(h, documents)
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return functional.linear(self.model.norm(h), head)

    def loss(self, token_ids: Tensor) -> Tensor:
        """Return the mean cross-entropy, in nats, of predicting ids[:, 1:] from ids[:, :-1]."""
        return token_loss(self(token_ids[:, :-1]), token_ids[:, 1:])


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats.

    Args:
        logits: [batch, time, vocab].
        targets: int64 [batch, time]; `UNTRAINED` where nothing is to be learned.
    """
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=UNTRAINED
    )

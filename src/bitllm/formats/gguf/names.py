"""What GGUF files call things: architectures, keys of the metadata, and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitllm.checkpoint import Activation

__all__ = [
    "ACTIVATION_BITS",
    "ARCHITECTURES",
    "REFUSED_ARCHITECTURES",
    "REFUSED_KEYS",
    "TENSOR_NAMES",
    "GgufArchitecture",
    "stored_name",
]


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """What an architecture string implies that no key says.

    Attributes:
        activation: of the feed-forward block.
        permuted: rows of q and k are reordered for RoPE over neighbours.
        qk_norm: an RMSNorm on each head of q and k belongs to it.
    """

    activation: Activation
    permuted: bool = False
    qk_norm: bool = False


ARCHITECTURES: Mapping[str, GgufArchitecture] = {
    "bitnet-b1.58": GgufArchitecture("relu2"),
    "bitnet-25": GgufArchitecture("relu2"),
    "bitnet": GgufArchitecture("silu"),
    "llama": GgufArchitecture("silu", permuted=True),
    "qwen2": GgufArchitecture("silu"),
    "qwen3": GgufArchitecture("silu", qk_norm=True),
}
"""The architectures that are read, by `general.architecture`, the prefix of their keys too."""

REFUSED_ARCHITECTURES: Mapping[str, str] = {
    "gemma3": "norms around each block and embeddings of its own kind",
    "minicpm": "scaled residuals and a scaled embedding",
    "hunyuan-dense": "Hunyuan's attention",
    "hunyuan-moe": "a mixture of experts",
    "qwen3moe": "a mixture of experts",
    "qwen35": "linear attention, and weights in a rotated basis where it is a Bonsai-2 model",
    "rwkv6": "a recurrent network",
    "hgrn_bit": "a recurrent network",
    "hgrn": "a recurrent network",
    "mamba": "a recurrent network",
    "falcon-h1": "a recurrent network beside attention",
}
"""What keeps known architectures from being run."""

REFUSED_KEYS: Mapping[str, str] = {
    "expert_count": "a mixture of experts",
    "ssm.conv_kernel": "a recurrent network",
    "attention.sliding_window": "sliding-window attention",
    "residual_scale": "scaled residuals",
    "embedding_scale": "a scaled embedding",
    "logit_scale": "scaled logits",
    "attention.clamp_kqv": "clamped attention",
    "use_parallel_residual": "parallel residuals",
    "hadamard.block_size": "weights in a rotated basis (Bonsai-2)",
    "quantization.rotation": "weights in a rotated basis (Bonsai-2)",
}
"""Keys, without the prefix of the architecture, of features that would change the result."""

ACTIVATION_BITS = "bitllm.activation_bits"
"""Key, which only bitllm writes, of how activations are quantised: 8, or 0 for not at all."""

_TOP = {"embed": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight"}

TENSOR_NAMES: Mapping[str, str] = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn_sub_norm": "attn_sub_norm",
    "ffn_sub_norm": "ffn_sub_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
}
"""Parts of a layer: canonical name to the name in `blk.N.<name>.weight`."""


def stored_name(name: str) -> str:
    """Return the name in a GGUF file of the tensor with canonical `name`.

    "layers.3.q" is blk.3.attn_q.weight, "layers.3.q.norm" blk.3.attn_q_norm_in.weight,
    "layers.3.q.bias" blk.3.attn_q.bias.
    """
    if name in _TOP:
        return _TOP[name]
    _, layer, part, *rest = name.split(".")
    prefix = f"blk.{layer}.{TENSOR_NAMES[part]}"
    return f"{prefix}{ {'': '.weight', 'norm': '_norm_in.weight', 'bias': '.bias'}[''.join(rest)] }"

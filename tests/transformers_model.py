"""A small BitNet model with a tokenizer, both made and written by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Run what transformers compiles as it is written: nothing is gained at these sizes.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet

CONTEXT = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CORPUS = ["The quick brown fox jumps over the lazy dog, and the dog sleeps. ", "Größe: 12 × 34"]


def write_transformers_model(directory: Path) -> Any:
    """Write model and tokenizer to a directory; return the model in float32, as it was written."""
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(directory)
    torch.manual_seed(3)
    config = transformers.BitNetConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    quantization = transformers.BitNetQuantConfig(
        linear_class="autobitlinear", quantization_mode="offline"
    )
    model = transformers.BitNetForCausalLM(config)
    model = bitnet.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model.config.quantization_config = quantization
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, bitnet.AutoBitLinear):
                module.to_empty(device="cpu")
                module.weight.copy_(torch.randint(-1, 2, module.weight.shape).float())
                module.weight_scale.fill_(module.in_features**-0.5)
        model.model.embed_tokens.weight.normal_(std=0.3)
    packed = {
        name: bitnet.pack_weights(tensor.clone()) if name.endswith("proj.weight") else tensor
        for name, tensor in model.state_dict().items()
    }
    model.save_pretrained(directory, state_dict=packed)
    return model.eval().float()


def _tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast

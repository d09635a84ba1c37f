"""Quantisation-aware fine-tuning with the Trainer of transformers: nothing of ours but one call.

    python recipes/transformers_trainer.py MODEL TEXT OUT [--steps 200] [--warmup 100]

MODEL is a folder or a name of the Hub, TEXT a UTF-8 text file. The rounding sets in over the first
`--warmup` steps. OUT gets master weights whose config.json says that they are to be quantised when
they are loaded: bitllm and transformers both read it, and `bitllm convert OUT PACKED` packs them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bitllm.train import quantize_model, set_strength

MASTERS = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "online",
    "modules_to_not_convert": ["lm_head"],
}
"""What config.json says of weights that are rounded when they are loaded."""


class StrengthWarmup(TrainerCallback):
    """Raises the strength of the rounding from 0 to 1 over the first `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the strength of the step that begins."""
        set_strength(kwargs["model"], min(1.0, state.global_step / max(self.steps, 1)))


def blocks(ids: list[int], length: int) -> list[dict[str, torch.Tensor]]:
    """Cut token ids into examples of `length` tokens that predict themselves."""
    whole = range(0, len(ids) - length + 1, length)
    cut = (torch.tensor(ids[start : start + length]) for start in whole)
    return [{"input_ids": block, "labels": block} for block in cut]


def main(arguments: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description="Quantisation-aware fine-tuning with Trainer.")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(quantize_model(model, skip=("lm_head",), strength=0.0))
    settings = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=options.learning_rate,
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    ids = tokenizer(options.text.read_text(encoding="utf-8"))["input_ids"]
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=blocks(ids, options.length),  # type: ignore[arg-type]
        callbacks=[StrengthWarmup(options.warmup)],
    )
    trainer.train()
    model.config.quantization_config = MASTERS
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()

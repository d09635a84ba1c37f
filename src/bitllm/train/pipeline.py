"""A whole run: corpus, tokenizer, shards, training, export, and a check of what was exported."""

from __future__ import annotations

import math
import os
from pathlib import Path

from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.errors import ConfigError
from bitllm.formats import open_checkpoint
from bitllm.train.bits import decoder_bits, held_out_pieces
from bitllm.train.data import TokenShards, write_shards
from bitllm.train.demo_text import python_documents
from bitllm.train.documents import Document, documents_sha256, file_documents, is_held_out
from bitllm.train.export import export_model
from bitllm.train.loop import report_to_stderr, train
from bitllm.train.recipe import Recipe, TextSettings
from bitllm.train.tokenizer_training import DocumentEncoder, train_tokenizer

__all__ = ["collect_documents", "exported_bits_per_byte", "prepare_text", "run_recipe"]


def run_recipe(recipe: Recipe, out: Path, resume: bool = False) -> Path:
    """Do everything a recipe says, inside the folder `out`.

    Args:
        recipe: the run.
        out: gets tokenizer.json, shards/, log.csv, checkpoint.pt and model/.
        resume: go on from the last checkpoint.

    Returns:
        The folder of the exported model, `out`/model.

    Raises:
        BitllmError: see `train`; also a corpus that is not the one the recipe pins.
    """
    if not resume or not (out / "shards").exists():
        prepare_text(recipe, out)
    result = train(recipe, out / "shards", out, resume=resume)
    model = export_model(result.model, out / "tokenizer.json", out / "model", recipe.export)
    if not math.isnan(result.held_out_bpb):
        length = recipe.training.sequence_length
        backend, exported = exported_bits_per_byte(model, out / "shards", length)
        report_to_stderr(
            f"held out: {result.held_out_bpb:.4f} bits per byte in training, {exported:.4f} as "
            f"exported ({backend} backend, gap {exported - result.held_out_bpb:+.4f})"
        )
    return model


def exported_bits_per_byte(model: Path, shards: Path, length: int) -> tuple[str, float]:
    """Measure an exported model on held-out text with the decoder that people run.

    Args:
        model: the exported folder.
        shards: a folder of token shards in the vocabulary of the model.
        length: most tokens in a piece, as `held_out_pieces` takes it.

    Returns:
        The name of the backend (`get_backend`: BITLLM_DEVICE, else the CPU), and bits per byte.
    """
    text = TokenShards.open(shards, "held_out")
    options = LoadOptions(kv_tokens=length, max_batch_tokens=length)
    decoder = get_backend().load(open_checkpoint(model), options)
    try:
        bits = decoder_bits(decoder, held_out_pieces(text, length))
        return decoder.info.backend, bits / text.text_bytes
    finally:
        decoder.close()


def prepare_text(recipe: Recipe, out: Path) -> None:
    """Write `out`/tokenizer.json and `out`/shards from the text of the recipe.

    Raises:
        ConfigError: the text is not the one that the recipe pins, or cannot be read.
    """
    documents = collect_documents(recipe.text, recipe.folder)
    out.mkdir(parents=True, exist_ok=True)
    percent = recipe.text.held_out_percent
    training = [d for d in documents if not is_held_out(d.group, percent)]
    tokenizer = train_tokenizer(training, recipe.tokenizer.vocab_size)
    temporary = out / "tokenizer.json.tmp"
    tokenizer.save(str(temporary), pretty=False)
    os.replace(temporary, out / "tokenizer.json")
    encoder = DocumentEncoder(out / "tokenizer.json")
    write_shards(documents, encoder, out / "shards", held_out_percent=percent)


def collect_documents(settings: TextSettings, folder: Path) -> list[Document]:
    """Return the corpus that a recipe names, checked against its hash.

    Raises:
        ConfigError: it cannot be read, or is another one.
    """
    if settings.source == "python":
        documents = python_documents()
    else:
        documents = file_documents([folder / name for name in settings.files])
    found = documents_sha256(documents)
    if settings.sha256 is not None and found != settings.sha256:
        release = f" (that of Python {settings.python})" if settings.python else ""
        raise ConfigError(
            f"the text hashes to {found}, the recipe pins {settings.sha256}{release}",
            hint="use that text, or remove text.sha256 from the recipe to take this one",
        )
    return documents

"""A whole run: corpus, tokenizer, shards, training, export, and a check of what was exported."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.errors import ConfigError
from bitllm.formats import open_checkpoint
from bitllm.formats.writers.texts import ModelTexts, read_texts
from bitllm.tokenizer import load_tokenizer
from bitllm.train.adapters import save_adapter
from bitllm.train.bits import decoder_bits
from bitllm.train.corpus import ModelEncoder, open_held_out
from bitllm.train.data import Encoder, write_shards
from bitllm.train.demo_text import python_documents
from bitllm.train.documents import Document, documents_sha256, file_documents, is_held_out
from bitllm.train.export import export_masters, export_model, trained_texts
from bitllm.train.export_check import check_codes, describe_gap
from bitllm.train.loop import Watch, report_to_stderr, train
from bitllm.train.ranks import ranks_of_run
from bitllm.train.recipe import Recipe, TextSettings
from bitllm.train.records import RecordDocuments
from bitllm.train.start import find_model
from bitllm.train.tokenizer_training import DocumentEncoder, train_tokenizer

__all__ = [
    "collect_documents",
    "exported_bits_per_byte",
    "prepare_text",
    "run_recipe",
    "run_watched",
]


def run_recipe(
    recipe: Recipe, out: Path, resume: bool = False, watch: Watch | None = None
) -> Path | None:
    """Do everything a recipe says, inside the folder `out`.

    Args:
        recipe: the run.
        out: gets tokenizer.json, shards/, log.csv, checkpoint.pt, and what comes of it: model/
            (packed) and masters/, or adapter/.
        resume: go on from the last checkpoint.
        watch: as for `train`.

    Returns:
        The folder of the exported model or adapter; None for weights of a kind that is trained for
        comparison only, and for all ranks but the first.

    Raises:
        BitllmError: see `train`; also a corpus that is not the one the recipe pins.
    """
    with ranks_of_run(recipe.training.device) as ranks:
        prepared = resume and (out / "shards").exists()
        if recipe.text.source != "chat" and ranks.first and not prepared:
            prepare_text(recipe, out)
        ranks.wait()
        result = train(recipe, out / "shards", out, resume=resume, watch=watch, ranks=ranks)
        if not ranks.first:
            return None
    if recipe.adapter is not None and recipe.start is not None:
        return save_adapter(result.model, recipe.adapter, out / "adapter", recipe.start.model)
    quantization = recipe.quantization
    if quantization.weight_bits != "1.58" or not quantization.activation_bits:
        return None
    texts = _texts(recipe, out)
    export_masters(result.model, texts, out / "masters")
    model = export_model(result.model, texts, out / "model")
    matrices = check_codes(result.model, model)
    if not math.isnan(result.held_out_bpb):
        backend, exported = exported_bits_per_byte(model, recipe, out / "shards")
        report_to_stderr(describe_gap(result.held_out_bpb, exported, backend, matrices))
    return model


def run_watched(recipe: Recipe, out: Path, resume: bool = False) -> Path | None:
    """Do everything a recipe says, with a live view where stderr is a terminal; as `run_recipe`."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        return run_recipe(recipe, out, resume)
    from rich.console import Console

    from bitllm.train.live_view import LiveView

    with LiveView(recipe.name, Console(stderr=True)) as view:
        return run_recipe(recipe, out, resume, watch=view)


def _texts(recipe: Recipe, out: Path) -> ModelTexts:
    """The text files of the model: those of the one it started from, or made for it."""
    if recipe.start is None:
        return trained_texts(out / "tokenizer.json", recipe.model.context, recipe.export)
    texts = read_texts(find_model(recipe.start.model, recipe.folder))
    return replace(texts, config=None, config_bytes=b"")


def exported_bits_per_byte(model: Path, recipe: Recipe, shards: Path) -> tuple[str, float]:
    """Measure an exported model on held-out text with the decoder that people run.

    Args:
        model: the exported folder.
        recipe: that it was trained by.
        shards: a folder of token shards in the vocabulary of the model; not read for dialogues.

    Returns:
        The name of the backend (`get_backend`: BITLLM_DEVICE, else the CPU), and bits per byte.
    """
    held_out = open_held_out(recipe, shards)
    length = max(map(len, held_out.pieces))
    options = LoadOptions(kv_tokens=length, max_batch_tokens=length)
    decoder = get_backend().load(open_checkpoint(model), options)
    try:
        bits = decoder_bits(decoder, held_out.pieces, held_out.counted)
        return decoder.info.backend, bits / held_out.text_bytes
    finally:
        decoder.close()


def prepare_text(recipe: Recipe, out: Path) -> None:
    """Write `out`/shards from the text of the recipe, and `out`/tokenizer.json where it is learned.

    Raises:
        ConfigError: the text is not the one that the recipe pins, or cannot be read.
        BitllmError: the tokenizer of the model in [start] cannot be read.
    """
    documents = collect_documents(recipe.text, recipe.folder)
    out.mkdir(parents=True, exist_ok=True)
    percent = recipe.text.held_out_percent
    encoder: Encoder
    if recipe.start is not None:
        encoder = ModelEncoder(load_tokenizer(find_model(recipe.start.model, recipe.folder)))
    else:
        training = (d for d in documents if not is_held_out(d.group, percent))
        tokenizer = train_tokenizer(training, recipe.tokenizer.vocab_size)
        temporary = out / "tokenizer.json.tmp"
        tokenizer.save(str(temporary), pretty=False)
        os.replace(temporary, out / "tokenizer.json")
        encoder = DocumentEncoder(out / "tokenizer.json")
    write_shards(documents, encoder, out / "shards", held_out_percent=percent)


def collect_documents(settings: TextSettings, folder: Path) -> Iterable[Document]:
    """Return the corpus that a recipe names, checked against its hash; to be gone through at will.

    Raises:
        ConfigError: it cannot be read, or is another one.
    """
    documents: Iterable[Document]
    if settings.source == "python":
        documents = python_documents()
    elif settings.source == "files":
        documents = file_documents([folder / name for name in settings.files])
    else:
        documents = RecordDocuments(
            settings.source, _record_names(settings, folder), settings.field, settings.split
        )
    if settings.sha256 is None:
        return documents
    found = documents_sha256(documents)
    if found != settings.sha256:
        release = f" (that of Python {settings.python})" if settings.python else ""
        raise ConfigError(
            f"the text hashes to {found}, the recipe pins {settings.sha256}{release}",
            hint="use that text, or remove text.sha256 from the recipe to take this one",
        )
    return documents


def _record_names(settings: TextSettings, folder: Path) -> list[Path | str]:
    """Return the files; of a dataset a folder where there is one, else the name on the Hub."""
    paths: list[Path | str] = [folder / name for name in settings.files]
    if settings.source == "dataset" and not Path(paths[0]).exists():
        return list(settings.files)
    return paths

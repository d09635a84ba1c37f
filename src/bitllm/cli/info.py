"""`bitllm info`: what a model is and what it needs, without loading it."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitllm.cli.model import split_options
from bitllm.cli.oddities import find_oddities
from bitllm.cli.options import (
    engine_options,
    json_option,
    model_reference,
    option,
    verbose_option,
)
from bitllm.cli.terminal import emit, emit_json, format_count
from bitllm.errors import TokenizerError

if TYPE_CHECKING:
    from pathlib import Path

    from bitllm.checkpoint import LayerSpec, ModelSpec
    from bitllm.config import EngineOptions
    from bitllm.formats import ModelFiles
    from bitllm.tokenizer import Tokenizer

__all__ = ["info"]


@click.command()
@model_reference
@engine_options
@option(
    "--batch",
    metavar="N",
    type=click.IntRange(min=1, max=100_000),
    default=1,
    help="Sequences side by side that the memory is planned for. Default: 1.",
)
@option("--check", is_flag=True, help="Look for what is unusual in all weights, not in a sample.")
@option("--tensors", is_flag=True, help="List every tensor of the files.")
@json_option
@verbose_option
def info(
    model: str | None, batch: int, check: bool, tensors: bool, as_json: bool, **options: Any
) -> None:
    """Show what a model is and what it needs, without loading it.

    MODEL is a directory or file, a short name (`bitllm list --known`), or org/name[@revision] on
    the Hugging Face Hub, which is downloaded if it is not in the cache.

    \b
    bitllm info microsoft/bitnet-b1.58-2B-4T
    bitllm info ./my-model --context 2048 --batch 8 --json
    """  # noqa: D301
    from bitllm.backends import choose_device
    from bitllm.config import EngineOptions
    from bitllm.engine.memory_plan import context_length, plan_memory
    from bitllm.formats import open_checkpoint, resolve_model
    from bitllm.formats.inspection import stored_tensors

    settings = EngineOptions.from_options(split_options(options)[0])
    device = choose_device(settings.device)
    files = resolve_model(model)
    # What readers warn of belongs to what is unusual, and is told there.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        checkpoint = open_checkpoint(files.path)
        tokenizer = _load_tokenizer(files)
    if batch > 1 and settings.kv_tokens is not None:
        raise click.UsageError("--batch says how many --kv-tokens there are; give one of them")
    if batch > 1:
        tokens = batch * _whole_blocks(context_length(checkpoint.spec, settings))
        settings = dataclasses.replace(settings, kv_tokens=tokens)
    plan = plan_memory(checkpoint, settings)
    stored = [
        {**dataclasses.asdict(tensor), "shape": [*tensor.shape]}
        for tensor in stored_tensors(files.path)
    ]
    facts: dict[str, Any] = {
        "model": {"name": files.name, "path": str(files.path), "origin": files.origin},
        "architecture": describe_architecture(checkpoint.spec),
        "parameters": count_parameters(checkpoint.spec),
        "text": _describe_text(files, tokenizer),
        "files": [
            {"name": path.name, "bytes": path.stat().st_size} for path in _model_files(files)
        ],
        "types": _by_type(stored),
        "oddities": [
            *dict.fromkeys(str(warning.message) for warning in told),
            *find_oddities(
                files,
                checkpoint,
                None if isinstance(tokenizer, TokenizerError) else tokenizer,
                thorough=check,
            ),
        ],
        "memory": {
            **dataclasses.asdict(plan),
            "batch": batch,
            "total": plan.total,
            "fits": plan.fits,
        },
        "device": dataclasses.asdict(device),
        "packing": _packing(checkpoint.spec, settings) if device.name == "cpu" else None,
    }
    if tensors:
        facts["tensors"] = stored
    if as_json:
        emit_json(facts)
    else:
        emit("\n".join(_lines(facts, plan.table())))


def describe_architecture(spec: ModelSpec) -> dict[str, Any]:
    """Return the architecture as plain values; layers that are alike are told together."""
    groups: list[dict[str, Any]] = []
    for index, layer in enumerate(spec.layers):
        described = _describe_layer(layer)
        if groups and groups[-1]["layer"] == described:
            groups[-1]["last"] = index
        else:
            groups.append({"first": index, "last": index, "layer": described})
    return {
        "name": spec.architecture,
        "layers": len(spec.layers),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_context": spec.max_context,
        "tied_head": spec.tied_head,
        "layer_groups": groups,
    }


def _describe_layer(layer: LayerSpec) -> dict[str, Any]:
    described = dataclasses.asdict(layer)
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        linear = described[name]
        described[name] = {key: value for key, value in linear.items() if value is not None}
    return described


def count_parameters(spec: ModelSpec) -> dict[str, int]:
    """Return the number of ternary weights, of all other parameters, and of both."""
    ternary = sum(linear.out_features * linear.in_features for _, linear in spec.linear_names())
    dense = sum(math.prod(shape) for shape in spec.dense_shapes().values())
    return {"ternary": ternary, "dense": dense, "total": ternary + dense}


def _whole_blocks(tokens: int) -> int:
    from bitllm.backends.base import KV_BLOCK_SIZE

    return -(-tokens // KV_BLOCK_SIZE) * KV_BLOCK_SIZE


def _load_tokenizer(files: ModelFiles) -> Tokenizer | TokenizerError:
    """Load the tokenizer; a broken one is told, not raised."""
    from bitllm.engine.loading import open_tokenizer

    try:
        return open_tokenizer(files.path)
    except TokenizerError as error:
        return error


def _describe_text(files: ModelFiles, tokenizer: Tokenizer | TokenizerError) -> dict[str, Any]:
    """Return what is known of tokenizer and generation."""
    from bitllm.engine.loading import model_defaults
    from bitllm.engine.request import describe_defaults
    from bitllm.formats import read_generation_config

    suggested = read_generation_config(files.path)
    if isinstance(tokenizer, TokenizerError):
        return {"error": tokenizer.message}
    defaults = model_defaults(suggested, tokenizer.stop_ids)
    return {
        "tokens": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "stop_ids": sorted(defaults.stop_ids),
        "chat_template": tokenizer.has_chat_template,
        "generation": describe_defaults(defaults),
    }


def _packing(spec: ModelSpec, settings: EngineOptions) -> dict[str, str] | None:
    """Return how the cpu device would hold the weights, and why; None without native module."""
    try:
        from bitllm.backends.cpu import choose_packing, cpu_info, kernel_names
    except ImportError:
        return None
    from bitllm.backends.sizes import ternary_bytes

    cpu = cpu_info()
    choice = choose_packing(
        settings.packing,
        cpu=cpu["name"],
        isa=settings.isa or kernel_names()[0],
        threads=settings.threads or cpu["physical_cores"],
        ternary_bytes=ternary_bytes(spec, "2bit"),
    )
    return dataclasses.asdict(choice)


def _model_files(files: ModelFiles) -> list[Path]:
    """Return the files of a directory, or those of a GGUF model."""
    from bitllm.formats.gguf import GgufModel

    if files.path.is_file():
        return [file.path for file in GgufModel(files.path).files]
    return sorted(path for path in files.path.iterdir() if path.is_file())


def _by_type(stored: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    types: dict[str, dict[str, int]] = {}
    for tensor in stored:
        total = types.setdefault(tensor["dtype"], {"tensors": 0, "bytes": 0})
        total["tensors"] += 1
        total["bytes"] += tensor["bytes"]
    return types


def _lines(facts: Mapping[str, Any], memory_table: str) -> Iterator[str]:
    from bitllm.engine.memory_plan import format_bytes

    model, parameters, memory = facts["model"], facts["parameters"], facts["memory"]
    yield f"model         {model['name']} ({model['origin']})"
    yield from _architecture_lines(facts["architecture"])
    yield (
        f"parameters    {format_count(parameters['total'])}:"
        f" {format_count(parameters['ternary'])} ternary,"
        f" {format_count(parameters['dense'])} other"
    )
    yield from _text_lines(facts["text"])
    yield f"device        {facts['device']['name']} ({facts['device']['reason']})"
    if facts["packing"] is not None:
        yield f"packing       {facts['packing']['name']} ({facts['packing']['reason']})"
    yield ""
    yield "files"
    for file in facts["files"]:
        yield f"  {file['name']:<32}  {format_bytes(file['bytes']):>9}"
    yield ""
    yield "tensors"
    for dtype, total in facts["types"].items():
        yield f"  {dtype:<9} {total['tensors']:>6}  {format_bytes(total['bytes']):>9}"
    for tensor in facts.get("tensors", ()):
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        size = format_bytes(tensor["bytes"])
        yield f"  {tensor['name']:<56} {tensor['dtype']:<9} {shape:>16}  {size:>9}"
    yield ""
    for odd in facts["oddities"]:
        yield f"unusual: {odd}"
    if facts["oddities"]:
        yield ""
    verdict = "fits" if memory["fits"] else "does not fit"
    several = f"{memory['batch']} sequences with " if memory["batch"] > 1 else ""
    yield f"memory for {several}a context of {memory['context']} tokens: {verdict}"
    yield memory_table


def _architecture_lines(architecture: Mapping[str, Any]) -> Iterator[str]:
    yield f"architecture  {architecture['name']}, {architecture['layers']} layers"
    head = "tied" if architecture["tied_head"] else "separate"
    yield f"width         {architecture['hidden_size']}"
    yield f"vocabulary    {architecture['vocab_size']}, {head} head"
    yield f"context       {architecture['max_context']}"
    groups = architecture["layer_groups"]
    for group in groups:
        label = "layers" if len(groups) == 1 else f"layers {group['first']}-{group['last']}"
        yield f"{label:<13} {_layer_line(group['layer'])}"


def _layer_line(layer: Mapping[str, Any]) -> str:
    parts = [
        f"{layer['num_heads']} heads",
        f"{layer['num_kv_heads']} KV heads",
        f"head size {layer['head_dim']}",
        f"feed-forward {layer['up']['out_features']} {layer['activation']}",
        f"RoPE base {layer['rope']['theta']:g}",
        "8-bit activations" if layer["down"].get("activation_bits") else "float activations",
    ]
    if layer["sliding_window"] is not None:
        parts.append(f"window {layer['sliding_window']}")
    switches = {
        "attn_sub_norm": "attention sub-norm",
        "ffn_sub_norm": "feed-forward sub-norm",
        "qk_norm": "q/k norm",
        "post_norms": "post-norms",
    }
    return ", ".join([*parts, *(text for name, text in switches.items() if layer[name])])


def _text_lines(text: Mapping[str, Any]) -> Iterator[str]:
    if "error" in text:
        yield f"tokenizer     error: {text['error']}"
        return
    template = "chat template" if text["chat_template"] else "no chat template"
    stops = ", ".join(map(str, text["stop_ids"])) or "none"
    yield f"tokenizer     {text['tokens']} tokens, {template}, start {text['bos_id']}, stop {stops}"
    yield f"generation    {text['generation']}"

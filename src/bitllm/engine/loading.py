"""`load`: from a model reference to an `LLM`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypedDict, Unpack

from bitllm.backends import choose_device, get_backend
from bitllm.backends.base import Backend, LoadOptions
from bitllm.checkpoint import (
    Checkpoint,
    DenseDtype,
    DenseTensor,
    MappedSource,
    StridedMatrix,
    TernaryMatrix,
)
from bitllm.config import (
    EngineOptions,
    HeadName,
    KvDtype,
    PackingName,
    SamplingParams,
    SpeculationName,
)
from bitllm.engine.draft_model import DraftModel
from bitllm.engine.llm import LLM
from bitllm.engine.memory_plan import MemoryPlan, plan_memory
from bitllm.engine.request import ModelDefaults
from bitllm.engine.speculation import Drafter, NgramDrafter, Speculation
from bitllm.errors import ConfigError, FormatError
from bitllm.formats import (
    GenerationDefaults,
    find_gguf,
    open_checkpoint,
    read_generation_config,
    read_gguf_texts,
    resolve_model,
)
from bitllm.tokenizer import Tokenizer, gguf_tokenizer, load_tokenizer, read_backend

__all__ = ["EngineKeywords", "load", "load_model", "model_defaults", "open_tokenizer"]

DEMO_NOTICE = (
    "bitllm: no model named, so this is the small demo model that comes with the package; "
    "for a real one try microsoft/bitnet-b1.58-2B-4T"
)


_COMPARED_TOKENS = 256  # enough to tell vocabularies apart


class EngineKeywords(TypedDict, total=False):
    """The keywords of `load`: the fields of `EngineOptions`."""

    device: str
    threads: int | None
    isa: str | None
    kv_dtype: KvDtype
    packing: PackingName
    head: HeadName
    context: int | None
    kv_tokens: int | None
    max_batch_tokens: int
    prefix_cache: bool
    speculation: SpeculationName
    draft_model: str | PathLike[str] | None
    draft_tokens: int
    memory_limit: int | None


def load(
    ref: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[EngineKeywords],
) -> LLM:
    """Load a model and return it ready to write.

        llm = bitllm.load("microsoft/bitnet-b1.58-2B-4T", threads=4, context=2048)

    Args:
        ref: a local directory or file, GGUF files too, "org/name" or "org/name@revision" on the
            Hugging Face Hub; None = the demo model that comes with bitllm (a line on stderr says
            so).
        revision: branch, tag or commit on the Hub.
        progress: called with (done, total) after each ternary matrix, the bulk of the work.
        **options: fields of `EngineOptions`.

    Raises:
        ConfigError: an option that does not exist, is out of range, or does not fit the model; a
            `draft_model` of another vocabulary.
        ModelNotFoundError: the reference names nothing that can be reached.
        CheckpointError: the model's files are broken or of a kind that bitllm does not run.
        BackendUnavailableError: the device is not on this machine.
        InsufficientMemoryError: the model does not fit; raised before its weights are read.
    """
    settings = EngineOptions.from_options(options)
    if ref is None:
        print(DEMO_NOTICE, file=sys.stderr)
    return load_model(ref, settings, revision=revision, progress=progress)


def load_model(
    ref: str | PathLike[str] | None,
    settings: EngineOptions,
    *,
    revision: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    admit: Callable[[str, MemoryPlan], None] | None = None,
) -> LLM:
    """Load a model; arguments and errors as of `load`.

    Args:
        ref: as in `load`.
        settings: its options.
        revision: as in `load`.
        progress: as in `load`.
        admit: called with the model's name and memory plan when everything but the weights has
            been read, and raises if they may not be; None = what the plan itself says.
    """
    choice = choose_device(settings.device)
    backend = get_backend(settings.device)
    files = resolve_model(ref, revision=revision)
    checkpoint = open_checkpoint(files.path)
    plan = plan_memory(checkpoint, settings)
    tokenizer = open_tokenizer(files.path)
    draft = None
    if settings.draft_model is not None:
        draft = _open_draft(settings, plan, tokenizer, checkpoint.spec.vocab_size)
        plan = replace(plan, draft=draft.plan.weights + draft.plan.kv + draft.plan.scratch)
    if admit is None:
        plan.check(files.name)
    defaults = model_defaults(read_generation_config(files.path), tokenizer.stop_ids)
    if admit is not None:
        admit(files.name, plan)
    decoder = backend.load(
        checkpoint if progress is None else _counted(checkpoint, progress),
        _load_options(settings, plan.kv_tokens),
    )
    return LLM(
        decoder,
        tokenizer,
        name=files.name,
        context=plan.context,
        max_batch_tokens=settings.max_batch_tokens,
        defaults=defaults,
        plan=plan,
        prefix_cache=settings.prefix_cache,
        device_reason=choice.reason,
        speculation=_speculation(settings, backend, draft),
    )


def _load_options(settings: EngineOptions, kv_tokens: int) -> LoadOptions:
    return LoadOptions(
        kv_tokens=kv_tokens,
        kv_dtype=settings.kv_dtype,
        threads=settings.threads,
        isa=settings.isa,
        packing=settings.packing,
        head=settings.head,
        max_batch_tokens=settings.max_batch_tokens,
    )


@dataclass(frozen=True, slots=True)
class _Draft:
    """A draft model that fits, not loaded yet."""

    checkpoint: Checkpoint
    plan: MemoryPlan


def _open_draft(
    settings: EngineOptions, plan: MemoryPlan, tokenizer: Tokenizer, vocab_size: int
) -> _Draft:
    """Open the draft model of a model.

    Raises:
        ConfigError: it has another vocabulary, or another number of rows for it.
    """
    files = resolve_model(settings.draft_model)
    checkpoint, other = open_checkpoint(files.path), open_tokenizer(files.path)
    found = checkpoint.spec.vocab_size
    sample = range(0, vocab_size, max(1, vocab_size // _COMPARED_TOKENS))
    if found != vocab_size or any(tokenizer.token(i) != other.token(i) for i in sample):
        raise ConfigError(
            f"draft_model {files.name} has another vocabulary than the model itself "
            f"({found} and {vocab_size} tokens)",
            hint="take a smaller model of the same family, or leave draft_model out",
        )
    context = min(plan.context, checkpoint.spec.max_context)
    own = replace(settings, context=context, kv_tokens=plan.kv_tokens, draft_model=None)
    return _Draft(checkpoint, plan_memory(checkpoint, own, available=plan.available))


def _speculation(
    settings: EngineOptions, backend: Backend, draft: _Draft | None
) -> Speculation | None:
    if settings.speculation == "off":
        return None
    drafters: list[Drafter] = [NgramDrafter()]
    if draft is not None:
        options = _load_options(settings, draft.plan.kv_tokens)
        decoder = backend.load(draft.checkpoint, options)
        drafters.append(DraftModel(decoder, settings.max_batch_tokens))
    return Speculation(drafters, settings.draft_tokens, settings.max_batch_tokens)


def open_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model.

    For a GGUF file that is the tokenizer.json beside it, if it has the same vocabulary, or else
    what the file's metadata say.

    Args:
        path: a model directory, or a GGUF file.

    Raises:
        TokenizerError: a file of the tokenizer is missing or broken.
        CheckpointError: the GGUF file is broken.
    """
    file = find_gguf(path)
    if file is None:
        return load_tokenizer(path)
    texts = read_gguf_texts(file)
    directory, tokens = file.parent, texts.get("tokenizer.ggml.tokens") or []
    if not (directory / "tokenizer.json").is_file():
        return gguf_tokenizer(texts, file.name)
    backend = read_backend(directory)
    sample = range(0, len(tokens), max(1, len(tokens) // _COMPARED_TOKENS))
    if any(backend.id_to_token(id) != tokens[id] for id in sample):
        warnings.warn(
            f"{directory / 'tokenizer.json'} has another vocabulary than {file.name}, whose own "
            "is used",
            stacklevel=2,
        )
        return gguf_tokenizer(texts, file.name)
    if tokens and not (directory / "tokenizer_config.json").is_file():
        return gguf_tokenizer(texts, file.name, backend)
    return load_tokenizer(directory)


class _CountedSource(MappedSource):
    """A source that tells how many ternary matrices have been read of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> None:
        self._checkpoint = checkpoint
        self._total = sum(1 for _ in checkpoint.spec.linear_names())
        self._done = 0
        self._progress = progress

    def dense(self, name: str) -> DenseTensor | None:
        return self._checkpoint.source.dense(name)

    def dense_dtype(self, name: str) -> DenseDtype | None:
        return self._checkpoint.dense_dtype(name)

    def is_mapped(self, name: str) -> bool:
        return self._checkpoint.is_mapped(name)

    def ternary(self, name: str) -> TernaryMatrix | None:
        matrix = self._checkpoint.source.ternary(name)
        self._count()
        return matrix

    def strided(self, name: str) -> StridedMatrix | None:
        matrix = self._checkpoint.strided(name)
        if matrix is not None:
            self._count()
        return matrix

    def release(self) -> None:
        self._checkpoint.release()

    def _count(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _counted(checkpoint: Checkpoint, progress: Callable[[int, int], None]) -> Checkpoint:
    return replace(checkpoint, source=_CountedSource(checkpoint, progress))


def model_defaults(suggested: GenerationDefaults, stop_ids: frozenset[int]) -> ModelDefaults:
    """Return what a model says about its own generation.

    A model whose generation_config says `do_sample: false`, or gives neither that nor a
    temperature, is greedy; one that says `do_sample: true` without a temperature samples at 1.

    Args:
        suggested: its generation_config.json.
        stop_ids: what its tokenizer and config call the end.

    Raises:
        FormatError: the file holds a value out of range.
    """
    temperature = suggested.temperature
    if temperature is None:
        temperature = 1.0 if suggested.do_sample else 0.0
    if suggested.do_sample is False or temperature < 0.001:
        temperature = 0.0
    given = {
        "temperature": temperature,
        "top_k": None if suggested.top_k is None else max(0, suggested.top_k),  # some write -1
        "top_p": suggested.top_p,
        "min_p": suggested.min_p,
        "typical_p": suggested.typical_p,
        "repetition_penalty": suggested.repetition_penalty,
        "max_tokens": suggested.max_new_tokens,
    }
    try:
        SamplingParams(**given)  # type: ignore[arg-type]
    except ConfigError as error:
        raise FormatError(
            f"generation_config.json: {error.message}", hint="correct the file, or remove it"
        ) from error
    known = {name: value for name, value in given.items() if value is not None}
    return ModelDefaults(**known, stop_ids=stop_ids.union(suggested.eos_token_ids))  # type: ignore[arg-type]

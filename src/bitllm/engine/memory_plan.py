"""How much memory a model will take, known before any of it is loaded."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitllm.backends import choose_device, get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions
from bitllm.backends.sizes import (
    kv_bytes_per_token,
    mlx_ternary_bytes,
    rounded_head_bytes,
    ternary_bytes,
)
from bitllm.checkpoint import DTYPE_BYTES, Checkpoint, ModelSpec
from bitllm.config import EngineOptions
from bitllm.errors import BackendUnavailableError, ConfigError, InsufficientMemoryError

__all__ = [
    "MemoryPlan",
    "available_memory",
    "context_length",
    "format_bytes",
    "kv_token_count",
    "plan_memory",
    "roomy_kv_tokens",
]

PROCESS_BYTES = 40_000_000
"""Interpreter and libraries: what a process holds before it has a model (measured, rounded up)."""

TOKENIZER_BYTES = 700
"""What the tokenizers library holds for each token of its vocabulary (measured at 128256)."""

REFERENCE_CODE_BITS = 8
"""Bits a ternary weight takes on the device "reference"."""

ROOMY_CONTEXTS = 8
ROOMY_TOKENS = 16384

LOGIT_ROWS = 8
"""Rows whose logits the device "reference" is taken to hold at once."""

CUDA_LOGIT_ROWS = 256
"""Rows of logits that the device "cuda" holds: those of its largest decode step."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory budget of one model, in bytes; on the device "cuda" that of the GPU.

    Attributes:
        weights: ternary codes, norms, embedding and head, or what stands for the head.
        kv: the KV cache when it is full; its pages are taken as they are used.
        scratch: intermediate results of one step.
        process: interpreter, libraries and tokenizer.
        available: what the machine can still give, None = unknown.
        limit: what the user allows, None = everything.
        context: most tokens of a sequence.
        kv_tokens: positions the KV cache holds over all sequences.
        kv_bytes_per_token: bytes of keys and values of one position.
        draft: what a second model that guesses tokens takes in all, 0 = there is none.
    """

    weights: int
    kv: int
    scratch: int
    process: int
    available: int | None
    limit: int | None
    context: int
    kv_tokens: int
    kv_bytes_per_token: int
    draft: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.kv + self.scratch + self.process + self.draft

    @property
    def allowed(self) -> int | None:
        """The smaller of what is available and what is allowed; None = nothing is known."""
        bounds = [bound for bound in (self.available, self.limit) if bound is not None]
        return min(bounds, default=None)

    @property
    def fits(self) -> bool:
        """Whether the total is within what is allowed."""
        return self.allowed is None or self.total <= self.allowed

    def rows(self) -> list[tuple[str, int]]:
        """Return the table's lines as (what, bytes), the total last."""
        return [
            ("weights", self.weights),
            (f"KV cache, {self.kv_tokens} tokens", self.kv),
            ("step scratch", self.scratch),
            ("process and tokenizer", self.process),
            *([("draft model", self.draft)] if self.draft else []),
            ("total", self.total),
        ]

    def table(self) -> str:
        """Return the budget as aligned text lines."""
        rows = self.rows()
        if self.available is not None:
            rows.append(("available", self.available))
        if self.limit is not None:
            rows.append(("memory_limit", self.limit))
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"  {what:<{width}}  {format_bytes(size):>9}" for what, size in rows)

    def check(self, name: str) -> None:
        """Refuse a plan that does not fit.

        Raises:
            InsufficientMemoryError: with the table, and the context that would fit.
        """
        if self.fits:
            return
        bound = "memory_limit" if self.allowed == self.limit else "the memory available"
        raise InsufficientMemoryError(
            f"{name} does not fit into {bound}:\n{self.table()}", hint=self._way_out()
        )

    def _way_out(self) -> str:
        room = (self.allowed or 0) - (self.total - self.kv)
        tokens = room // self.kv_bytes_per_token // KV_BLOCK_SIZE * KV_BLOCK_SIZE
        if tokens >= KV_BLOCK_SIZE:
            return f"context={tokens} (with no larger kv_tokens) fits"
        return "free some memory, raise memory_limit, or take a smaller model"


def context_length(spec: ModelSpec, options: EngineOptions) -> int:
    """Return the most tokens of one sequence.

    Raises:
        ConfigError: `options.context` is more than the model was made for.
    """
    if options.context is None:
        return spec.max_context
    if options.context > spec.max_context:
        raise ConfigError(
            f"context is {options.context}, but the model was made for {spec.max_context} tokens",
            hint=f"take context={spec.max_context} or less",
        )
    return options.context


def kv_token_count(spec: ModelSpec, options: EngineOptions) -> int:
    """Return the positions of the KV cache: `kv_tokens` or `context`, in whole blocks.

    Raises:
        ConfigError: the cache would not hold one sequence.
    """
    context = context_length(spec, options)
    tokens = context if options.kv_tokens is None else options.kv_tokens
    if tokens < context:
        raise ConfigError(
            f"kv_tokens is {tokens}, but one sequence may have {context} (context)",
            hint="raise kv_tokens, or set a smaller context",
        )
    return -(-tokens // KV_BLOCK_SIZE) * KV_BLOCK_SIZE


def roomy_kv_tokens(checkpoint: Checkpoint, options: EngineOptions, *, share: float = 0.5) -> int:
    """Return the positions of a KV cache for many sequences at once.

    Eight contexts, but at least 16384 positions, as far as `share` of the memory that one context
    would leave has room for them; and one context in any case.

    Args:
        checkpoint: an opened model.
        options: how it would be loaded; `kv_tokens` is not looked at.
        share: the part of the memory that may be planned for further sequences, 0 to 1.

    Raises:
        BackendUnavailableError, ConfigError, MissingTensorError: as of `plan_memory`.
    """
    plan = plan_memory(checkpoint, replace(options, kv_tokens=None))
    wanted = max(ROOMY_CONTEXTS * plan.context, ROOMY_TOKENS)
    if plan.allowed is not None:
        room = max(0, plan.allowed - plan.total) * share
        wanted = min(wanted, plan.context + int(room / plan.kv_bytes_per_token))
    return max(wanted, plan.context)


def plan_memory(
    checkpoint: Checkpoint, options: EngineOptions, *, available: int | None = None
) -> MemoryPlan:
    """Return the memory budget of a model without reading its weights.

    Args:
        checkpoint: an opened model; only the sizes of its tensors are looked at.
        options: how it would be loaded.
        available: bytes there are; None = ask the machine.

    Raises:
        BackendUnavailableError: this version has no such device.
        ConfigError: context or kv_tokens do not fit the model; an unknown device.
        MissingTensorError: the checkpoint lacks a tensor.
    """
    spec = checkpoint.spec
    device = choose_device(options.device).name
    per_token = kv_bytes_per_token(spec, options.kv_dtype)
    tokens = kv_token_count(spec, options)
    return MemoryPlan(
        weights=_weight_bytes(checkpoint, device, options),
        kv=tokens * per_token,
        scratch=_scratch_bytes(checkpoint, device, options, tokens),
        # On a GPU what is available is told after its driver has taken what it needs.
        process=0 if device == "cuda" else PROCESS_BYTES + TOKENIZER_BYTES * spec.vocab_size,
        available=available_memory(device) if available is None else available,
        limit=options.memory_limit,
        context=context_length(spec, options),
        kv_tokens=tokens,
        kv_bytes_per_token=per_token,
    )


def _weight_bytes(checkpoint: Checkpoint, device: str, options: EngineOptions) -> int:
    """Return the bytes of all tensors as `device` holds them; dense tensors as stored.

    The CPU backend leaves embedding and head in the mapped file, unless they had to be decoded.
    They count where each token reads the whole head; not where a rounded copy of it says which rows
    are to be read. Scales are one number a matrix or a row, against thousands of weights, and not
    counted.
    """
    spec = checkpoint.spec
    value_bytes = {name: DTYPE_BYTES[checkpoint.dense_dtype(name)] for name in spec.dense_shapes()}
    dense = {
        name: math.prod(shape) * value_bytes[name] for name, shape in spec.dense_shapes().items()
    }
    stored = sum(dense.values())
    if device == "reference":
        return stored + REFERENCE_CODE_BITS * ternary_bytes(spec, "2bit") // 2
    if device == "mlx":
        return stored + mlx_ternary_bytes(spec)
    if device == "cuda":
        return stored + ternary_bytes(spec, "2bit")
    # What "auto" means is known when the model is loaded: the larger packing is planned for.
    packed = ternary_bytes(spec, "2bit" if options.packing == "auto" else options.packing)
    head = "embed" if spec.tied_head else "head"
    rounded = rounded_head_bytes(spec, options.head, value_bytes[head])
    if rounded:
        mapped = [name for name in ("embed", "head") if name in dense]
        stored -= sum(dense[name] for name in mapped if checkpoint.is_mapped(name))
    return stored + packed + rounded


def _scratch_bytes(
    checkpoint: Checkpoint, device: str, options: EngineOptions, kv_tokens: int
) -> int:
    """Return the bytes of a step's intermediate results; an estimate for all devices but "cpu"."""
    spec = checkpoint.spec
    if device != "cpu":
        logit_rows = LOGIT_ROWS
        if device == "cuda":
            logit_rows = min(CUDA_LOGIT_ROWS, options.max_batch_tokens)
        return _estimated_scratch(spec, options.max_batch_tokens, logit_rows)
    from bitllm.backends.cpu import scratch_bytes

    wanted = LoadOptions(
        kv_tokens=kv_tokens,
        threads=options.threads,
        head=options.head,
        max_batch_tokens=options.max_batch_tokens,
    )
    head = checkpoint.dense_dtype("embed" if spec.tied_head else "head")
    return scratch_bytes(spec, wanted, head)


def _estimated_scratch(spec: ModelSpec, rows: int, logit_rows: int) -> int:
    """Return roughly what `rows` token rows take.

    Residual and block output in fp32, the widest stage in fp32 and its input in int8, cosines and
    sines; and for `logit_rows` rows logits, and what sorting them takes.
    """
    stage = spec.hidden_size
    for layer in spec.layers:
        attention = layer.q.out_features + layer.k.out_features + layer.v.out_features
        stage = max(stage, attention, layer.gate.out_features + layer.up.out_features)
    heads = max(layer.head_dim for layer in spec.layers)
    a_row = 4 * (2 * spec.hidden_size + stage + heads) + stage
    return rows * a_row + 32 * logit_rows * spec.vocab_size


def available_memory(device: str = "cpu") -> int | None:
    """Return the bytes this process can still take without swapping; None = unknown.

    The smaller of what the kernel calls available and what the control group still allows. For the
    device "cpu" this is the figure of its native code, by which it also loads; it knows control
    groups of version 1 and nested ones. On the device "mlx" no more than what Metal recommends;
    for "cuda" it is what the GPU has free.
    """
    if device == "cuda":
        return _free_on_gpu()
    if device == "cpu" and (found := _native_available()):
        return found
    bounds = [_system_available(), _group_available(Path("/sys/fs/cgroup"))]
    if device == "mlx":
        bounds.append(_metal_available())
    return min((bound for bound in bounds if bound is not None), default=None)


def _free_on_gpu() -> int | None:
    """Return what the GPU has free, None = there is none, or no PyTorch: loading says so."""
    try:
        backend: Any = get_backend("cuda")
    except BackendUnavailableError:
        return None
    free: int | None = backend.free_memory()
    return free


def _native_available() -> int:
    """Return the figure of the native module, 0 = unknown or not built."""
    try:
        from bitllm.backends.cpu import available_memory as native_figure
    except ImportError:
        return 0
    return int(native_figure())


def _metal_available() -> int | None:
    """Return what Metal recommends, None without Metal or MLX."""
    try:
        from bitllm.backends.mlx.device import available_memory as metal_figure
    except ImportError:
        return None
    return metal_figure()


def _system_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _group_available(root: Path) -> int | None:
    """Return what a version 2 control group mounted at `root` still allows, None = no limit."""
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # File pages that are not in use count as used here, but are given back when memory is wanted.
    return max(0, limit - used + int(stat.get("inactive_file", 0)))


def format_bytes(size: int) -> str:
    """Return a size as people read it, in powers of 1000: "1.18 GB", "812 MB", "96 kB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            value = size / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size} B"

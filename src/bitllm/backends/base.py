"""The seam between the engine and the devices: `Backend.load(checkpoint, options) -> Decoder`.

One `Decoder.forward(batch)` computes one step: all layers for all token runs of the batch, then the
head, and sampling, for the rows that asked. Everything in a `Batch` is a flat array, so that it can
be sent to other ranks or copied into the buffers of a CUDA graph.

The decoder owns KV *storage*, in blocks of `KV_BLOCK_SIZE` positions; the engine owns block *ids*:
which run reads and writes which block is said by the block tables of each batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from bitllm.adapter import Adapter
from bitllm.checkpoint import Checkpoint, ModelSpec
from bitllm.config import CHOICES, HeadName, KvDtype, PackingName
from bitllm.errors import ConfigError

__all__ = [
    "KV_BLOCK_SIZE",
    "Backend",
    "Batch",
    "Decoder",
    "DecoderInfo",
    "LoadOptions",
    "OutputKind",
    "SamplePlan",
    "StepOutput",
    "check_batch",
]

KV_BLOCK_SIZE = 32
"""Token positions in a KV block. Attention merges its sums block by block, in order of position, so
this is part of the numerics contract."""

I32 = npt.NDArray[np.int32]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a backend is to load a checkpoint.

    Attributes:
        kv_tokens: positions the KV cache can hold over all sequences together, rounded up to
            whole blocks; None = the model's context window.
        kv_dtype: storage of keys and values; both are rounded into the cache before attention
            reads them.
        threads: worker threads, None = one for each physical core the process may use.
        isa: kernel set by name ("scalar", "avx2", "avxvnni", "avx512vnni", "neon-base", "neon",
            "neon-i8mm"), None = the best one this machine runs.
        packing: how ternary weights are held: "2bit" a weight, "base3" (1.6 bits), or "auto" = what
            a table of measurements says for the kernel set, the threads and the model's size.
        head: how logits are computed: "full" reads the head as it is stored; "screened" finds by 4
            bits a weight which rows can matter and computes those alone, with the same tokens but
            for a stated probability of failure; "int8-screened" likewise with 8 bits and a proof;
            "int8" rounds the head, so that logits are approximate; "auto" = the fastest with a
            stated guarantee.
        max_batch_tokens: most token rows a step may have; sizes the step's scratch memory.
    """

    kv_tokens: int | None = None
    kv_dtype: KvDtype = "bf16"
    threads: int | None = None
    isa: str | None = None
    packing: PackingName = "auto"
    head: HeadName = "auto"
    max_batch_tokens: int = 256

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("kv_tokens", "threads", "max_batch_tokens"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ConfigError(f"{name} must be a positive whole number, got {value!r}")


class OutputKind:
    """What a row of a batch wants back: values of `Batch.output_kinds`.

    Plain numbers: given an enum, NumPy asks its Python methods for its own hooks, and an interrupt
    (Ctrl-C) that arrives in one of those is lost.
    """

    HIDDEN: Final = 0
    """The hidden state after the final norm, float32 [hidden]."""
    LOGITS: Final = 1
    """All logits, float32 [vocab]."""
    SCORE: Final = 2
    """Log-probability of a target id, and the `top_n` most likely ids."""
    SAMPLE: Final = 3
    """A token drawn by the row's entry of the `SamplePlan`."""
    COUNT: Final = 4
    """How many kinds there are."""


@dataclass(frozen=True, slots=True)
class SamplePlan:
    """How to draw tokens: parallel arrays with one entry for each SAMPLE row, in row order.

    Order of application to the row's logits: bias, penalties, mask, temperature, top-k, top-p
    (within the top-k), min-p, typical, draw. Temperature 0 is the argmax of the logits after the
    mask, the lowest id winning a tie; cuts and seed are then ignored. The draw is the Gumbel argmax
    over the kept ids, its uniforms a function of (seed, choice, position, token id) alone.

    Attributes:
        temperature: float32 [n], >= 0.
        top_k: int32 [n], 0 = off.
        top_p: float32 [n] in (0, 1], 1 = off.
        min_p: float32 [n] in [0, 1], 0 = off: drops ids less likely than min_p times the likeliest.
        typical_p: float32 [n] in (0, 1], 1 = off: keeps the ids whose surprise (minus the logarithm
            of their probability) is nearest to the entropy of what the other cuts left, as few as
            together reach this probability (locally typical sampling, Meister et al. 2022).
        seed: uint64 [n].
        choice: int32 [n], which of several completions of one prompt.
        position: int32 [n], index of the drawn token in its completion.
        top_logprobs: int32 [n], -1 = no log-probabilities; k >= 0 = that of the drawn id and the
            k best. They are of the model's own distribution: before bias, penalties, mask and
            temperature.
        repetition_penalty: float32 [n], 1 = off; divides positive, multiplies negative logits of
            seen ids.
        frequency_penalty: float32 [n], subtracted once for each time an id was generated.
        presence_penalty: float32 [n], subtracted from ids generated at least once.
        seen_offsets, seen_ids, seen_counts: int32; ids seen by row i are
            seen_ids[seen_offsets[i]:seen_offsets[i + 1]], each once, with the number of times it
            was *generated* (0 = in the prompt only).
        bias_offsets, bias_ids, bias_values: the same layout; values float32 are added to logits.
        mask: uint32 [m, ceil(vocab / 32)]; bit id % 32 of word id // 32 set = allowed.
        mask_rows: int32 [n], row of `mask` for each entry, -1 = none.
    """

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    typical_p: F32
    seed: U64
    choice: I32
    position: I32
    top_logprobs: I32
    repetition_penalty: F32
    frequency_penalty: F32
    presence_penalty: F32
    seen_offsets: I32
    seen_ids: I32
    seen_counts: I32
    bias_offsets: I32
    bias_ids: I32
    bias_values: F32
    mask: U32
    mask_rows: I32

    @staticmethod
    def greedy(count: int = 0) -> SamplePlan:
        """Return a plan of `count` entries that draws the argmax and changes no logit."""
        return SamplePlan(
            temperature=np.zeros(count, np.float32),
            top_k=np.zeros(count, np.int32),
            top_p=np.ones(count, np.float32),
            min_p=np.zeros(count, np.float32),
            typical_p=np.ones(count, np.float32),
            seed=np.zeros(count, np.uint64),
            choice=np.zeros(count, np.int32),
            position=np.zeros(count, np.int32),
            top_logprobs=np.full(count, -1, np.int32),
            repetition_penalty=np.ones(count, np.float32),
            frequency_penalty=np.zeros(count, np.float32),
            presence_penalty=np.zeros(count, np.float32),
            seen_offsets=np.zeros(count + 1, np.int32),
            seen_ids=np.zeros(0, np.int32),
            seen_counts=np.zeros(0, np.int32),
            bias_offsets=np.zeros(count + 1, np.int32),
            bias_ids=np.zeros(0, np.int32),
            bias_values=np.zeros(0, np.float32),
            mask=np.zeros((0, 0), np.uint32),
            mask_rows=np.full(count, -1, np.int32),
        )

    def at(self, position: I32) -> SamplePlan:
        """Return the plan for other positions, int32 [n]; twice as fast as `replace`."""
        values = list(_plan_values(self))
        values[_POSITION] = position
        return SamplePlan(*values)

    def __len__(self) -> int:
        return len(self.temperature)


_PLAN_FIELDS = tuple(field.name for field in fields(SamplePlan))
_POSITION = _PLAN_FIELDS.index("position")
_plan_values = attrgetter(*_PLAN_FIELDS)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's work: runs of consecutive tokens, each the next part of one sequence.

    Attributes:
        token_ids: int32 [tokens], the runs one after another.
        positions: int32 [tokens], absolute; consecutive within a run.
        run_offsets: int32 [runs + 1]; run r is rows run_offsets[r]:run_offsets[r + 1].
        block_tables: int32 [runs, blocks], -1 = unused; position p of run r lives in block
            block_tables[r, p // KV_BLOCK_SIZE]. Blocks up to the run's last position must be named;
            no block is written in two places.
        adapter_slots: int32 [runs], as `Decoder.load_adapter` returned them; -1 = none.
        output_rows: int32 [outputs], token row of each output request.
        output_kinds: uint8 [outputs], `OutputKind`.
        score_targets, score_top_n: int32 [number of SCORE requests], in request order.
        plan: one entry for each SAMPLE request, in request order.
    """

    token_ids: I32
    positions: I32
    run_offsets: I32
    block_tables: I32
    adapter_slots: I32
    output_rows: I32
    output_kinds: npt.NDArray[np.uint8]
    score_targets: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    score_top_n: I32 = field(default_factory=lambda: np.zeros(0, np.int32))
    plan: SamplePlan = field(default_factory=SamplePlan.greedy)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step's rows asked for, on the host; each array is in request order of its kind.

    Attributes:
        hidden: float32 [HIDDEN requests, hidden].
        logits: float32 [LOGITS requests, vocab].
        sampled: int32 [SAMPLE requests].
        logprobs: float32 [SAMPLE requests + SCORE requests]: log-probability of the drawn id, then
            of the target; NaN where none was asked for.
        top_ids, top_logprobs: int32 / float32 [SAMPLE + SCORE requests, widest top_n], most likely
            first (ties: lowest id), padded with -1 / NaN.
    """

    hidden: F32
    logits: F32
    sampled: I32
    logprobs: F32
    top_ids: I32
    top_logprobs: F32


@dataclass(frozen=True, slots=True)
class DecoderInfo:
    """What a loaded decoder runs on; for people to read.

    Attributes:
        backend: "cpu", "reference", ...
        kernel: name of the kernel set.
        threads: worker threads.
        weight_bytes: bytes of weights resident for this decoder, mapped files included.
        kv_bytes: bytes of KV storage.
        scratch_bytes: bytes of step scratch.
        packing: how ternary weights are held, "2bit" or "base3"; "" where a backend has one way.
        head: how logits are computed, as in `LoadOptions`; "" where a backend has one way.
    """

    backend: str
    kernel: str
    threads: int
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    packing: str = ""
    head: str = ""


class Decoder(Protocol):
    """A model loaded on a device."""

    spec: ModelSpec
    info: DecoderInfo

    @property
    def kv_capacity(self) -> int:
        """Number of KV blocks; block ids are 0 .. kv_capacity - 1."""

    def forward(self, batch: Batch) -> StepOutput:
        """Compute one step; see `Batch` and `StepOutput`.

        Raises:
            ConfigError: the batch contradicts itself or the model (an id outside the vocabulary, a
                position without a block, more rows than `max_batch_tokens`).
            QuantizationError: activations have become NaN or infinite, as those of damaged weights
                do; what this batch wrote into its KV blocks means nothing.
        """

    def copy_blocks(self, pairs: I32) -> None:
        """Copy KV blocks, int32 [n, 2] of (source, destination), in order."""

    def read_blocks(self, blocks: I32) -> npt.NDArray[np.uint8]:
        """Return the stored bytes of some KV blocks, uint8 [n, bytes per block]."""

    def write_blocks(self, blocks: I32, data: npt.NDArray[np.uint8]) -> None:
        """Store bytes that `read_blocks` returned into these KV blocks."""

    def load_adapter(self, adapter: Adapter) -> int:
        """Copy an adapter to the device and return its slot, for `Batch.adapter_slots`.

        Raises:
            TensorShapeError: it was made for another architecture.
            InsufficientMemoryError: it does not fit; nothing has changed then.
        """

    def unload_adapter(self, slot: int) -> None:
        """Free an adapter; its slot may be given to another one.

        Raises:
            ConfigError: there is no adapter in this slot.
        """

    def adapter_bytes(self, adapter: Adapter) -> int:
        """Return the bytes that `load_adapter` would take, for weights and for scratch."""

    def close(self) -> None:
        """Free weights and KV storage; the decoder cannot be used afterwards."""


class Backend(Protocol):
    """A device that can load checkpoints."""

    name: str

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Decoder:
        """Prepare the weights of `checkpoint` for this device, streaming tensor by tensor.

        Raises:
            CheckpointError: a tensor is missing, broken, or of a kind this backend does not run.
            InsufficientMemoryError: the memory plan does not fit.
        """


_ENTRY_FIELDS = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "seed",
    "choice",
    "position",
    "top_logprobs",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "mask_rows",
)


def check_batch(
    batch: Batch,
    spec: ModelSpec,
    kv_capacity: int,
    max_batch_tokens: int,
    adapters: Collection[int] = (),
) -> None:
    """Refuse a batch that contradicts itself or the model.

    Every backend calls this before anything else, or makes the same checks in native code, where
    they cost less. `adapters` are the slots in use.

    Raises:
        ConfigError: naming the first contradiction found.
    """
    tokens, runs = len(batch.token_ids), len(batch.run_offsets) - 1
    if not 0 < tokens <= max_batch_tokens:
        raise ConfigError(
            f"a step takes 1 to {max_batch_tokens} token rows, got {tokens}",
            hint="raise max_batch_tokens or split the batch",
        )
    offsets = batch.run_offsets
    if runs < 1 or offsets[0] != 0 or offsets[-1] != tokens or (np.diff(offsets) < 1).any():
        raise ConfigError(f"run_offsets must rise from 0 to {tokens}, got {offsets.tolist()}")
    if (
        len(batch.positions) != tokens
        or len(batch.adapter_slots) != runs
        or len(batch.block_tables) != runs
    ):
        raise ConfigError(
            "positions must have one entry for each token, adapter_slots and block_tables one for "
            "each run"
        )
    for slot in set(batch.adapter_slots.tolist()) - {-1}:
        if slot not in adapters:
            raise ConfigError(
                f"adapter slot {slot} is empty; in use are {sorted(adapters) or 'none'}",
                hint="adapter_slots are -1, or what load_adapter returned",
            )
    if batch.token_ids.min() < 0 or batch.token_ids.max() >= spec.vocab_size:
        raise ConfigError(
            f"token ids must lie in 0 .. {spec.vocab_size - 1}, "
            f"got {batch.token_ids.min()} .. {batch.token_ids.max()}"
        )
    starts = np.repeat(batch.positions[offsets[:-1]] - offsets[:-1], np.diff(offsets))
    if batch.positions.min() < 0 or (batch.positions != starts + np.arange(tokens)).any():
        raise ConfigError("positions must be consecutive and not negative within each run")
    written = []
    for run in range(runs):
        used = int(batch.positions[offsets[run + 1] - 1]) // KV_BLOCK_SIZE + 1
        blocks = batch.block_tables[run, :used]
        if len(blocks) < used or blocks.min() < 0 or blocks.max() >= kv_capacity:
            raise ConfigError(
                f"run {run} reaches KV block {used - 1} of its sequence, but its block table does "
                f"not name {used} blocks of 0 .. {kv_capacity - 1}"
            )
        written.append(blocks[int(batch.positions[offsets[run]]) // KV_BLOCK_SIZE :])
    blocks, places = np.unique(np.concatenate(written), return_counts=True)
    if (places > 1).any():
        raise ConfigError(
            f"KV block {blocks[places > 1][0]} would be written in two places at once",
            hint="give each run blocks of its own from its first position on",
        )
    _check_outputs(batch, tokens, spec)


def _check_outputs(batch: Batch, tokens: int, spec: ModelSpec) -> None:
    rows, kinds = batch.output_rows, batch.output_kinds
    if len(rows) != len(kinds) or (len(rows) and (rows.min() < 0 or rows.max() >= tokens)):
        raise ConfigError(f"output_rows must name rows 0 .. {tokens - 1}, one for each output kind")
    if len(kinds) and kinds.max() > OutputKind.SAMPLE:
        raise ConfigError(f"unknown output kind {kinds.max()}")
    scores = int((kinds == OutputKind.SCORE).sum())
    samples = int((kinds == OutputKind.SAMPLE).sum())
    if len(batch.score_targets) != scores or len(batch.score_top_n) != scores:
        raise ConfigError(f"{scores} SCORE requests need as many score_targets and score_top_n")
    if len(batch.plan) != samples:
        raise ConfigError(
            f"{samples} SAMPLE requests need a plan of {samples} entries, got {len(batch.plan)}"
        )
    if scores and (batch.score_targets.min() < 0 or batch.score_targets.max() >= spec.vocab_size):
        raise ConfigError(f"score_targets must lie in 0 .. {spec.vocab_size - 1}")
    if scores and batch.score_top_n.min() < 0:
        raise ConfigError(f"score_top_n must not be negative, got {batch.score_top_n.min()}")
    if samples:
        _check_plan(batch.plan, spec.vocab_size)


def _check_plan(plan: SamplePlan, vocab_size: int) -> None:
    count = len(plan)
    for name in _ENTRY_FIELDS:
        if len(getattr(plan, name)) != count:
            raise ConfigError(f"plan.{name} has {len(getattr(plan, name))} entries, not {count}")
    fits = {
        "temperature": (plan.temperature >= 0) & np.isfinite(plan.temperature),
        "top_k": plan.top_k >= 0,
        "top_p": (plan.top_p > 0) & (plan.top_p <= 1),
        "min_p": (plan.min_p >= 0) & (plan.min_p <= 1),
        "typical_p": (plan.typical_p > 0) & (plan.typical_p <= 1),
        "choice": plan.choice >= 0,
        "position": plan.position >= 0,
        "repetition_penalty": plan.repetition_penalty > 0,
        "mask_rows": (plan.mask_rows >= -1) & (plan.mask_rows < len(plan.mask)),
    }
    for name, fit in fits.items():
        if not fit.all():
            raise ConfigError(f"plan.{name} holds {getattr(plan, name)[~fit][0]}, out of range")
    if plan.mask.ndim != 2 or (len(plan.mask) and plan.mask.shape[1] != -(-vocab_size // 32)):
        raise ConfigError(f"plan.mask must have {-(-vocab_size // 32)} words a row")
    for offsets, ids, values in (
        ("seen_offsets", "seen_ids", "seen_counts"),
        ("bias_offsets", "bias_ids", "bias_values"),
    ):
        _check_lists(getattr(plan, offsets), offsets, count, len(getattr(plan, ids)))
        listed = getattr(plan, ids)
        if len(listed) != len(getattr(plan, values)):
            raise ConfigError(f"plan.{ids} and plan.{values} must be of one length")
        if len(listed) and (listed.min() < 0 or listed.max() >= vocab_size):
            raise ConfigError(f"plan.{ids} must lie in 0 .. {vocab_size - 1}")


def _check_lists(offsets: I32, name: str, count: int, length: int) -> None:
    fits = len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] == length
    if not fits or (np.diff(offsets) < 0).any():
        raise ConfigError(f"plan.{name} must rise from 0 to {length} in {count + 1} steps")

"""`bitllm bench` without its command line: what is measured, in which order, and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from bitllm.backends import choose_device, get_backend
from bitllm.backends.base import KV_BLOCK_SIZE, LoadOptions
from bitllm.backends.cpu import CpuBackend
from bitllm.bench.gate import (
    CONTEXT,
    SEQUENCES,
    evidence,
    reference_evidence,
    require_equal,
    require_near,
)
from bitllm.bench.machine import describe
from bitllm.bench.model import Loading, SpeedRow, StageRow, Timed, TimedStage, Workbench
from bitllm.bench.operations import LatencyRow, OperationRow, latencies, operations
from bitllm.bench.roofline import Limits
from bitllm.bench.tune import Tuned, tune
from bitllm.checkpoint import ModelSpec
from bitllm.config import EngineOptions
from bitllm.engine.memory_plan import context_length
from bitllm.errors import ConfigError
from bitllm.formats import open_checkpoint, resolve_model

__all__ = ["BenchResult", "BenchSettings", "run_bench"]

PROMPTS = (128, 512)
DEPTHS = (0, 256, 2048)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What is to be measured.

    Attributes:
        prompts: tokens of the prompts whose prefill is measured; several prompts at once only with
            the shortest. None = 128 and 512, as far as the model was made for them.
        generate: tokens drawn in a run of decoding.
        depths: positions before the first drawn token. None = 0, 256 and 2048, likewise.
        batches: sequences side by side.
        repeats: runs of each figure.
        profile: also where the time of a step goes.
        small: also single quantised operations, and the latency of small models; cpu device only.
        tune: also which packing is faster; kept for later runs.
        engine: how the model is loaded; `context` is the longest sequence that may be measured.
    """

    prompts: tuple[int, ...] | None = None
    generate: int = 32
    depths: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 8)
    repeats: int = 5
    profile: bool = False
    small: bool = True
    tune: bool = False
    engine: EngineOptions = field(default_factory=EngineOptions)

    def __post_init__(self) -> None:
        least = {"prompts": 1, "depths": 0, "batches": 1, "generate": 1, "repeats": 1}
        for name, low in least.items():
            given = getattr(self, name)
            values = (given,) if isinstance(given, int) else given
            if values is not None and (not values or min(values) < low):
                raise ConfigError(f"{name} must be at least {low}, got {given}")


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Everything that was measured; `dataclasses.asdict` makes the JSON document of it.

    Attributes:
        machine: CPU, versions and commit.
        model: name of the model.
        backend, kernel, threads, packing, head, kv_dtype: how it ran.
        limits: what the machine can do at most.
        loading: seconds and bytes of loading.
        peak_memory: the highest resident bytes with one sequence: anonymous, file, resident.
        speed: prefill and decode.
        stages: where the time goes, if asked for.
        operations, latency: small work.
        tuned: the faster packing, if asked for.
        impossible: figures above what the machine can do, in words; each is an error.
    """

    machine: dict[str, object]
    model: str
    backend: str
    kernel: str
    threads: int
    packing: str
    head: str
    kv_dtype: str
    limits: Limits
    loading: Loading
    peak_memory: dict[str, int]
    speed: list[SpeedRow]
    stages: list[StageRow]
    operations: list[OperationRow]
    latency: list[LatencyRow]
    tuned: Tuned | None
    impossible: list[str]


def run_bench(
    ref: str | None, settings: BenchSettings, say: Say = lambda text: None
) -> BenchResult:
    """Check the output of a model, then measure it.

    Args:
        ref: a model reference; None = the demo model.
        settings: what is measured.
        say: told what is being done.

    Raises:
        MeasurementError: the model's output is not that of the scalar kernels.
        ConfigError: lengths beyond what the model was made for, or a device that has no limits to
            compare with.
        BitllmError: as `bitllm.load` raises it.
    """
    device = choose_device(settings.engine.device)
    if device.name not in ("cpu", "mlx"):
        raise ConfigError(
            f"bench measures the devices cpu and mlx, not {device.name} ({device.reason})",
            hint="take --device cpu",
        )
    if device.name != "cpu" and (settings.profile or settings.tune):
        raise ConfigError(
            f"only the cpu device has stages to profile and packings to tune, not {device.name}",
            hint="leave --profile and --tune out, or take --device cpu",
        )
    backend = get_backend(device.name)
    files = resolve_model(ref)
    checkpoint = open_checkpoint(files.path)
    work = _Work.of(settings, checkpoint.spec)
    options = _load_options(settings, work)
    say("checking the output against the scalar kernels")
    wanted = reference_evidence(CpuBackend(), checkpoint, options)
    del checkpoint
    tuned = None
    if settings.tune:
        tokens, repeats = settings.generate, settings.repeats
        tuned = tune(files.path, options, wanted, tokens=tokens, repeats=repeats, say=say)
    with Workbench(
        files.path, options, repeats=settings.repeats, backend=backend, say=say
    ) as bench:
        loading = bench.load()
        info = bench.info
        require = require_equal if device.name == "cpu" else require_near
        require(evidence(bench.decoder), wanted, f"{files.name} on {info.kernel}")
        say("limits of this machine")
        limits = bench.limits()
        speed = list(work.one(bench))
        peak_memory = bench.peak_memory()
        speed += work.many(bench)
        stages: list[TimedStage] = []
        if settings.profile:
            stages += bench.stages("decode", settings.generate, min(work.depths))
            stages += bench.stages("prefill", max(work.prompts), 0)
        # Once more: the machine may have been busy, and no figure may be above the limits.
        limits = limits.best(bench.limits())
    rows = [SpeedRow.of(timed, limits) for timed in speed]
    packing = info.packing or "2bit"
    single: list[OperationRow] = []
    latency: list[LatencyRow] = []
    if settings.small and device.name == "cpu":
        say("quantised operations")
        single += operations(info.kernel, settings.engine.packing, info.threads, settings.repeats)
        latency += latencies(settings.engine.threads, settings.engine.isa, settings.repeats, say)
    return BenchResult(
        machine=describe(),
        model=files.name,
        backend=info.backend,
        kernel=info.kernel,
        threads=info.threads,
        packing=packing,
        head=info.head or "full",
        kv_dtype=settings.engine.kv_dtype,
        limits=limits,
        loading=loading,
        peak_memory=peak_memory,
        speed=rows,
        stages=[StageRow.of(stage, limits) for stage in stages],
        operations=single,
        latency=latency,
        tuned=tuned,
        impossible=[
            f"{row.work} of {row.tokens} tokens, batch {row.batch}, depth {row.depth}: {problem}"
            for row in rows
            for problem in row.impossible
        ],
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The lengths that are measured."""

    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    batches: tuple[int, ...]
    generate: int

    @staticmethod
    def of(settings: BenchSettings, spec: ModelSpec) -> _Work:
        """Leave out defaults beyond the context; refuse what was asked for beyond it."""
        room = context_length(spec, settings.engine)
        prompts = settings.prompts or tuple(n for n in PROMPTS if n <= room) or (room,)
        depths = settings.depths
        if depths is None:
            depths = tuple(n for n in DEPTHS if n == 0 or n + settings.generate <= room)
        longest = max(*prompts, *(depth + settings.generate for depth in depths))
        if longest > room:
            raise ConfigError(
                f"{longest} tokens are more than the context of {room} tokens",
                hint="measure shorter prompts (-p), fewer tokens (-n) or smaller depths",
            )
        rows = settings.engine.max_batch_tokens
        if max(settings.batches) > rows:
            raise ConfigError(
                f"batch {max(settings.batches)}: a step has at most {rows} token rows "
                "(max_batch_tokens), and each sequence takes one",
                hint=f"measure at most {rows} sequences side by side",
            )
        return _Work(prompts, depths, settings.batches, settings.generate)

    def one(self, bench: Workbench) -> Iterator[Timed]:
        """Measure one sequence, if that was asked for."""
        if 1 in self.batches:
            for tokens in self.prompts:
                yield bench.prefill(tokens, 1)
            for depth in self.depths:
                yield bench.decode(depth, self.generate, 1)

    def many(self, bench: Workbench) -> Iterator[Timed]:
        """Measure several sequences side by side."""
        for batch in self.batches:
            if batch > 1:
                yield bench.prefill(min(self.prompts), batch)
                for depth in self.depths:
                    yield bench.decode(depth, self.generate, batch)

    def kv_tokens(self) -> int:
        """Return the positions that all this needs, in whole blocks for each sequence."""

        def blocks(tokens: int) -> int:
            return -(-tokens // KV_BLOCK_SIZE)

        deepest = blocks(max(self.depths) + self.generate)
        most = [max(self.batches) * max(deepest, blocks(min(self.prompts)))]
        most += [deepest, blocks(max(self.prompts)), SEQUENCES * blocks(CONTEXT)]
        return max(most) * KV_BLOCK_SIZE


def _load_options(settings: BenchSettings, work: _Work) -> LoadOptions:
    engine = settings.engine
    return LoadOptions(
        kv_tokens=work.kv_tokens(),
        kv_dtype=engine.kv_dtype,
        threads=engine.threads,
        isa=engine.isa,
        packing=engine.packing,
        head=engine.head,
        max_batch_tokens=engine.max_batch_tokens,
    )

"""A model under measurement: loading, memory, prompts, decoding, and where the time goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from bitllm.backends.base import Backend, Decoder, DecoderInfo, LoadOptions
from bitllm.backends.cpu import CpuBackend, CpuDecoder
from bitllm.bench.machine import PeakMemory, memory
from bitllm.bench.needs import Need, Needs
from bitllm.bench.roofline import Limits, Rates
from bitllm.bench.steps import Sequences
from bitllm.bench.timing import Spread, repeat, seconds
from bitllm.checkpoint import ModelSpec
from bitllm.engine.loading import open_tokenizer
from bitllm.formats import open_checkpoint

__all__ = ["HeadUse", "Loading", "SpeedRow", "StageRow", "Timed", "TimedStage", "Workbench"]

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Loading:
    """What it took to have the model ready.

    Attributes:
        seconds: median of several loads from a warm file cache.
        spread: (max - min) / median of them.
        tokenizer_s: seconds to load the tokenizer, not part of `seconds`; None if there is none.
        file_bytes: bytes of the weight files.
        base_memory: resident bytes before the first load: anonymous, file, resident.
        weight_bytes, kv_bytes, scratch_bytes: as in `DecoderInfo`.
    """

    seconds: float
    spread: float
    tokenizer_s: float | None
    file_bytes: int
    base_memory: dict[str, int]
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class HeadUse:
    """What a step needs of a screened head, on average: nothing, if the head is not screened.

    Attributes:
        exact_rows: rows of the stored head that were read because the rounded copy could not
            decide them.
        fallbacks: how often the whole head was read after all.
    """

    exact_rows: float
    fallbacks: float

    @staticmethod
    def between(before: Mapping[str, int], after: Mapping[str, int], steps: int) -> HeadUse:
        """Return the mean of so many steps from two counts of `CpuDecoder.head_statistics`."""
        rescored, full = (after[name] - before[name] for name in ("rescored", "full"))
        return HeadUse(rescored / steps, full / steps)


@dataclass(frozen=True, slots=True)
class Timed:
    """What was timed, and what it needed.

    Attributes:
        work: "prefill" or "decode".
        tokens: of each prompt, or drawn in each sequence.
        batch: sequences side by side.
        depth: positions before the first token.
        tokens_per_s: tokens of all sequences a second, the median of the runs.
        spread: (max - min) / median of the runs.
        seconds: of a prefill run, or of a decode step.
        bytes_read: bytes that a run of prefill, or a decode step, has to read.
        ternary: multiplications with ternary codes in it.
        head: what it needed of a screened head.
    """

    work: str
    tokens: int
    batch: int
    depth: int
    tokens_per_s: float
    spread: float
    seconds: float
    bytes_read: int
    ternary: int
    head: HeadUse


@dataclass(frozen=True, slots=True)
class SpeedRow(Timed):
    """A figure of speed beside the limits of the machine.

    Attributes:
        rates: what its needs are a second, and of the limits.
        impossible: what is above a limit; then the figure is wrong.
    """

    rates: Rates
    impossible: list[str]

    @staticmethod
    def of(timed: Timed, limits: Limits) -> SpeedRow:
        """Compare with the limits."""
        need = Need(nbytes=timed.bytes_read, ternary=timed.ternary)
        rates = Rates.of(need, timed.seconds, limits)
        known = {item.name: getattr(timed, item.name) for item in fields(timed)}
        return SpeedRow(**known, rates=rates, impossible=list(rates.impossible()))


@dataclass(frozen=True, slots=True)
class TimedStage:
    """A stage of a step, or of a whole prompt.

    Attributes:
        work: "prefill" or "decode".
        stage: its name.
        seconds: in this stage, the mean of the workers.
        fraction: of all stages.
        need: bytes and multiplications that the stage needs.
    """

    work: str
    stage: str
    seconds: float
    fraction: float
    need: Need


@dataclass(frozen=True, slots=True)
class StageRow(TimedStage):
    """A stage beside the limits of the machine.

    Attributes:
        rates: what its needs are a second, and of the limits.
    """

    rates: Rates

    @staticmethod
    def of(timed: TimedStage, limits: Limits) -> StageRow:
        """Compare with the limits."""
        known = {item.name: getattr(timed, item.name) for item in fields(timed)}
        spent = timed.seconds
        nothing = Rates(0.0, 0.0, 0.0, 0.0)
        return StageRow(
            **known, rates=Rates.of(timed.need, spent, limits) if spent > 0 else nothing
        )


class Workbench:
    """One model, loaded for measurement; a context manager that frees it.

    Args:
        path: the model directory.
        options: how it is loaded; `kv_tokens` must hold what is measured.
        repeats: runs of each figure.
        backend: the device; None = the CPU.
        say: told what is being done.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        *,
        backend: Backend | None = None,
        repeats: int,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._path = path
        self._options = options
        self._repeats = repeats
        self._say = say
        self._backend = CpuBackend() if backend is None else backend
        self._decoder: Decoder | None = None
        self._peak = PeakMemory()
        checkpoint = open_checkpoint(path)
        self._head = checkpoint.dense("embed" if checkpoint.spec.tied_head else "head")

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        if self._decoder is not None:
            self._decoder.close()

    @property
    def decoder(self) -> Decoder:
        """The loaded model."""
        assert self._decoder is not None, "load() comes first"
        return self._decoder

    @property
    def _native(self) -> CpuDecoder:
        """The loaded model of the CPU, which alone times its stages."""
        assert isinstance(self.decoder, CpuDecoder)
        return self.decoder

    def _head_counts(self) -> dict[str, int]:
        if isinstance(self.decoder, CpuDecoder):
            return self.decoder.head_statistics
        return {"rescored": 0, "full": 0}

    def limits(self) -> Limits:
        """Measure what this machine can do at most with the bytes of this model."""
        if self.info.backend == "mlx":
            return Limits.of_mlx(self.step_bytes)
        return Limits.measure(self.info.kernel, self.info.threads, self.step_bytes)

    @property
    def spec(self) -> ModelSpec:
        """Its architecture."""
        return self.decoder.spec

    @property
    def info(self) -> DecoderInfo:
        """What it runs on."""
        return self.decoder.info

    def load(self) -> Loading:
        """Load several times; afterwards the model is ready, and runs can be timed."""
        self._say("loading")
        files = sorted(self._path.glob("*.safetensors"))
        _warm_file_cache(files)
        before = memory()
        times = []
        with self._peak:
            times.append(seconds(self._load))
        for _ in range(min(self._repeats, 3) - 1):
            self.decoder.close()
            times.append(seconds(self._load))
        info, load_s = self.info, Spread.of(times)
        return Loading(
            load_s.median,
            load_s.spread,
            self._tokenizer_seconds(),
            sum(file.stat().st_size for file in files),
            before,
            info.weight_bytes,
            info.kv_bytes,
            info.scratch_bytes,
        )

    def _load(self) -> None:
        self._decoder = self._backend.load(open_checkpoint(self._path), self._options)

    def peak_memory(self) -> dict[str, int]:
        """Return the highest resident bytes of the first load, and now: anonymous, file, all."""
        self._peak.sample()
        return dict(self._peak.bytes)

    def _tokenizer_seconds(self) -> float | None:
        if not (self._path / "tokenizer.json").exists():
            return None
        return seconds(lambda: open_tokenizer(self._path))

    def _sequences(self, count: int, context: int) -> Sequences:
        return Sequences(self.decoder, count, context, self._options.max_batch_tokens)

    def prefill(self, tokens: int, batch: int) -> Timed:
        """Measure prompts of so many tokens."""
        self._say(f"prefill of {tokens} tokens, batch {batch}")
        sequences = self._sequences(batch, tokens)
        run, head = self._time(lambda: sequences.prefill(tokens), 1)
        needs = self._needs(head)
        need = sum(needs.step([(0, tokens)] * batch, batch).values(), Need())
        steps = sequences.prefill_steps(tokens)
        need += Need(nbytes=(steps - 1) * sum(needs.packed.values()))  # each reads the weights
        return _timed("prefill", tokens, batch, 0, run, batch * tokens, need, head)

    def decode(self, depth: int, tokens: int, batch: int) -> Timed:
        """Measure so many tokens drawn in each sequence from `depth` on."""
        self._say(f"decode at depth {depth}, batch {batch}")
        sequences = self._sequences(batch, depth + tokens)
        self._fill(sequences, depth)
        run, head = self._time(lambda: sequences.decode(depth, tokens), tokens)
        step = Spread(run.median / tokens, run.spread)
        need = self._needs(head).step([(depth + tokens // 2, 1)] * batch, batch)
        total = sum(need.values(), Need())
        return _timed("decode", tokens, batch, depth, step, batch, total, head)

    def stages(self, work: str, tokens: int, depth: int) -> list[TimedStage]:
        """Return where the time of the median run goes: of a prompt, or of a step of decoding."""
        self._say(f"stages of {work}")
        sequences = self._sequences(1, depth + tokens)
        self._fill(sequences, depth)
        steps, run = 1, [(0, tokens)]
        action: Callable[[], None] = partial(sequences.prefill, tokens)
        if work == "decode":
            steps, run = tokens, [(depth + tokens // 2, 1)]
            action = partial(sequences.decode, depth, tokens)
        action()
        before = self._head_counts()
        runs = []
        for _ in range(self._repeats):
            self._native.measure_stages(True)
            action()
            runs.append(self._native.stage_seconds())
        self._native.measure_stages(False)
        # One run that was: stages of the median run add up to what it took.
        spent = sorted(runs, key=lambda run: sum(run.values()))[len(runs) // 2]
        head = HeadUse.between(before, self._head_counts(), self._repeats * steps)
        need = self._needs(head).step(run, 1)
        total = sum(spent.values())
        return [
            TimedStage(
                work, stage, time / steps, time / total if total else 0.0, need.get(stage, Need())
            )
            for stage, time in spent.items()
        ]

    def step_seconds(self, tokens: int) -> Spread:
        """Return the seconds of a native step that draws a token, without anything of Python."""
        sequences = self._sequences(1, tokens)
        sequences.decode(0, tokens)
        samples = []
        for _ in range(self._repeats):
            self._native.measure_stages(False)
            sequences.decode(0, tokens)
            samples.append(self._native.step_seconds() / tokens)
        return Spread.of(samples)

    def _fill(self, sequences: Sequences, depth: int) -> None:
        """Put keys and values of a real prompt in front of what is decoded."""
        if depth:
            sequences.prefill(depth, 1)
            sequences.share_prompt()

    def _time(self, action: Callable[[], None], steps: int) -> tuple[Spread, HeadUse]:
        before = self._head_counts()
        run = repeat(action, self._repeats)
        runs = self._repeats + 1
        return run, HeadUse.between(before, self._head_counts(), runs * steps)

    def _needs(self, head: HeadUse) -> Needs:
        row = self._head.nbytes // self.spec.vocab_size
        decoder: Any = self.decoder  # of the CPU or of MLX: both know their packed bytes
        whole = getattr(decoder, "rounded_head_bytes", 0) or self._head.nbytes
        return Needs(
            self.spec,
            self.info.packing or "2bit",
            decoder.packed_bytes(),
            round(whole + head.exact_rows * row + head.fallbacks * self._head.nbytes),
            self._options.kv_dtype,
        )

    @property
    def step_bytes(self) -> int:
        """Bytes that a decode step without context reads, if no row of the head is rescored."""
        need = self._needs(HeadUse(0.0, 0.0)).step([(0, 1)], 1)
        return sum(need.values(), Need()).nbytes


def _timed(
    work: str,
    tokens: int,
    batch: int,
    depth: int,
    run: Spread,
    done: int,
    need: Need,
    head: HeadUse,
) -> Timed:
    return Timed(
        work=work,
        tokens=tokens,
        batch=batch,
        depth=depth,
        tokens_per_s=done / run.median,
        spread=run.spread,
        seconds=run.median,
        bytes_read=need.nbytes,
        ternary=need.ternary,
        head=head,
    )


def _warm_file_cache(files: Sequence[Path]) -> None:
    """Read files once, so that loading is measured and not the disk."""
    for path in files:
        with path.open("rb") as file:
            while file.read(BLOCK):
                pass

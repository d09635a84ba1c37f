"""A model under measurement: loading, memory, prompts, decoding, and where the time of a step goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bitllm.backends.base import KV_BLOCK_SIZE, DecoderInfo, LoadOptions
from bitllm.backends.cpu import CpuBackend, CpuDecoder
from bitllm.bench.machine import PeakMemory, memory
from bitllm.bench.needs import Need, Needs
from bitllm.bench.roofline import Limits, Rates
from bitllm.bench.steps import Sequences
from bitllm.bench.timing import Spread, repeat, seconds
from bitllm.checkpoint import Checkpoint, ModelSpec
from bitllm.formats import open_checkpoint
from bitllm.tokenizer import load_tokenizer

__all__ = ["Loading", "SpeedRow", "StageRow", "Workbench", "needs_of"]

BLOCK = 1 << 20
WARM_STEPS = 2


@dataclass(frozen=True, slots=True)
class Loading:
    """What it took to have the model ready.

    Attributes:
        seconds: median of several loads from a warm file cache.
        spread: (max - min) / median of them.
        tokenizer_s: seconds to load the tokenizer, not part of `seconds`; None if there is none.
        file_bytes: bytes of the weight files.
        base_memory: resident bytes before the first load: anonymous, file, resident.
        peak_memory: the highest of each while the model was loaded and ran one sequence.
        weight_bytes, kv_bytes, scratch_bytes: as in `DecoderInfo`.
    """

    seconds: float
    spread: float
    tokenizer_s: float | None
    file_bytes: int
    base_memory: dict[str, int]
    peak_memory: dict[str, int]
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One figure of speed.

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
        rates: what that is a second, and of the limits.
        impossible: what is above a limit; then the figure is wrong.
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
    rates: Rates
    impossible: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage of the steps of a run.

    Attributes:
        work: "prefill" or "decode".
        stage: its name.
        seconds: of a step, the mean of the workers.
        fraction: of the step.
        need: bytes and multiplications of a step in this stage.
        rates: what that is a second, and of the limits.
    """

    work: str
    stage: str
    seconds: float
    fraction: float
    need: Need
    rates: Rates


class Workbench:
    """One model, loaded for measurement; a context manager that frees it.

    Args:
        path: the model directory.
        options: how it is loaded; `kv_tokens` must hold what is measured.
        repeats: runs of each figure.
        say: told what is being done.
    """

    def __init__(
        self,
        path: Path,
        options: LoadOptions,
        *,
        repeats: int,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._path = path
        self._options = options
        self._repeats = repeats
        self._say = say
        self._decoder: CpuDecoder | None = None
        self._peak: PeakMemory | None = None
        self._filled = 0

    def __enter__(self) -> Workbench:
        return self

    def __exit__(self, *_: object) -> None:
        if self._decoder is not None:
            self._decoder.close()

    @property
    def decoder(self) -> CpuDecoder:
        """The loaded model."""
        assert self._decoder is not None, "load() comes first"
        return self._decoder

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
        with PeakMemory() as peak:
            times.append(seconds(self._load))
            self._run_once()
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
            dict(peak.bytes),
            info.weight_bytes,
            info.kv_bytes,
            info.scratch_bytes,
        )

    def _load(self) -> None:
        self._decoder = CpuBackend().load(open_checkpoint(self._path), self._options)

    def _run_once(self) -> None:
        one = self._sequences(1, KV_BLOCK_SIZE)
        one.prefill(KV_BLOCK_SIZE - 1)
        one.decode(KV_BLOCK_SIZE - 1, 1)

    def _tokenizer_seconds(self) -> float | None:
        if not (self._path / "tokenizer.json").exists():
            return None
        return seconds(lambda: load_tokenizer(self._path))

    def _sequences(self, count: int, context: int) -> Sequences:
        return Sequences(self.decoder, count, context, self._options.max_batch_tokens)

    def prefill(self, tokens: int, batch: int, limits: Limits) -> SpeedRow:
        """Measure prompts of so many tokens."""
        self._say(f"prefill of {tokens} tokens, batch {batch}")
        sequences = self._sequences(batch, tokens)
        run = repeat(lambda: sequences.prefill(tokens), self._repeats)
        need = self._prefill_need(tokens, batch)
        return self._row("prefill", tokens, batch, 0, run, batch * tokens, need, limits)

    def _prefill_need(self, tokens: int, batch: int) -> Need:
        needs, chunk = needs_of(self.decoder, self._path, self._options), self._options
        total = batch * tokens
        steps = -(-total // chunk.max_batch_tokens)
        whole = needs.step([(0, tokens)] * batch, batch)
        need = sum(whole.values(), Need())
        again = (steps - 1) * sum(needs.packed.values())  # each step reads the weights
        return need + Need(nbytes=again)

    def decode(self, depth: int, tokens: int, batch: int, limits: Limits) -> SpeedRow:
        """Measure so many tokens drawn in each sequence from `depth` on."""
        self._say(f"decode at depth {depth}, batch {batch}")
        sequences = self._sequences(batch, depth + tokens)
        self._fill(sequences, depth)
        sequences.decode(depth, min(WARM_STEPS, tokens))
        run = repeat(lambda: sequences.decode(depth, tokens), self._repeats)
        step = Spread(run.median / tokens, run.spread)
        need = self._decode_need(depth, tokens, batch)
        return self._row("decode", tokens, batch, depth, step, batch, need, limits)

    def _fill(self, sequences: Sequences, depth: int) -> None:
        """Put keys and values of a real prompt in front of what is decoded."""
        if depth == 0:
            return
        if self._filled < depth:
            sequences.prefill(depth, 1)
            self._filled = depth
        if sequences.count > 1:
            sequences.share_prompt()
            # The second sequence begins where the first had its end, if that was longer.
            self._filled = min(self._filled, sequences.blocks * KV_BLOCK_SIZE)

    def _decode_need(self, depth: int, tokens: int, batch: int) -> Need:
        """Return the need of a step in the middle of a run."""
        needs = needs_of(self.decoder, self._path, self._options)
        middle = depth + tokens // 2
        return sum(needs.step([(middle, 1)] * batch, batch).values(), Need())

    def _row(
        self,
        work: str,
        tokens: int,
        batch: int,
        depth: int,
        run: Spread,
        done: int,
        need: Need,
        limits: Limits,
    ) -> SpeedRow:
        rates = Rates.of(need, run.median, limits)
        return SpeedRow(
            work,
            tokens,
            batch,
            depth,
            done / run.median,
            run.spread,
            run.median,
            need.nbytes,
            need.ternary,
            rates,
            list(rates.impossible()),
        )

    def stages(self, work: str, tokens: int, depth: int, limits: Limits) -> list[StageRow]:
        """Return where the time of the steps goes, of one prompt or of some decoded tokens."""
        self._say(f"stages of {work}")
        sequences = self._sequences(1, depth + tokens)
        self._fill(sequences, depth)
        needs = needs_of(self.decoder, self._path, self._options)
        if work == "prefill":
            steps = -(-tokens // self._options.max_batch_tokens)
            need = needs.step([(0, tokens)], 1)
        else:
            steps = tokens
            need = needs.step([(depth + tokens // 2, 1)], 1)
        run: Callable[[], None] = (
            (lambda: sequences.prefill(tokens))
            if work == "prefill"
            else (lambda: sequences.decode(depth, tokens))
        )
        run()
        self.decoder.measure_stages(True)
        run()
        spent = self.decoder.stage_seconds()
        self.decoder.measure_stages(False)
        if work == "prefill":
            spent, steps = {name: time for name, time in spent.items()}, 1
        return list(_stage_rows(work, spent, steps, need, limits))


def _stage_rows(
    work: str,
    spent: dict[str, float],
    steps: int,
    need: dict[str, Need],
    limits: Limits,
) -> Iterator[StageRow]:
    total = sum(spent.values())
    for stage, time in spent.items():
        wanted, each = need.get(stage, Need()), time / steps
        rates = Rates.of(wanted, each, limits) if each > 0 else Rates(0, 0, 0, 0)
        yield StageRow(work, stage, each, time / total if total else 0.0, wanted, rates)


def needs_of(decoder: CpuDecoder, path: Path, options: LoadOptions) -> Needs:
    """Return what the steps of a loaded model need."""
    checkpoint = open_checkpoint(path)
    return Needs(
        decoder.spec,
        decoder.info.packing or "2bit",
        decoder.packed_bytes(),
        _head_bytes(checkpoint, decoder),
        options.kv_dtype,
    )


def _head_bytes(checkpoint: Checkpoint, decoder: CpuDecoder) -> int:
    return checkpoint.dense("embed" if checkpoint.spec.tied_head else "head").nbytes


def _warm_file_cache(files: Sequence[Path]) -> None:
    """Read files once, so that loading is measured and not the disk."""
    for path in files:
        with path.open("rb") as file:
            while file.read(BLOCK):
                pass

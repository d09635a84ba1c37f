"""One repeat of the comparison of peers.py, in a process of its own: load, warm up, measure.

    python benchmarks/peer_repeat.py bitllm build/models/2b --threads 2

peers.py starts it again for each repeat, with the interpreter of the peer, so that memory and
thread pools of two engines never mix. Each engine does the same work: fill the context with a
prompt, then draw tokens greedily, one at a time. The warm-up is a prompt and a decode run of the
measured lengths: pages of a mapped model come in while they are first used. The only line of stdout
is JSON: tokens a second for each kind of work.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Work:
    """What each engine has to do, and with how many threads.

    Attributes:
        prefill: tokens of the measured prompt, which is also the longest step.
        steps: tokens of a decode run.
        depths: tokens already in the context when a decode run begins.
        sequences: decoded side by side, from an empty context: a run for each of these counts.
        threads: worker threads.
    """

    prefill: int
    steps: int
    depths: tuple[int, ...]
    sequences: tuple[int, ...]
    threads: int

    @property
    def context(self) -> int:
        """Positions that the context has to hold, of all sequences."""
        one = max(self.prefill, *self.depths) + max(self.steps, 2)
        return max(one, self.together * (self.steps + 32))  # some engines keep whole blocks

    @property
    def together(self) -> int:
        """The most sequences side by side, 1 if there are no such runs."""
        return max(self.sequences, default=1)

    def options(self) -> list[str]:
        """Return the options of this script that state this work."""
        return [
            f"--prefill={self.prefill}",
            f"--steps={self.steps}",
            f"--sequences={','.join(map(str, self.sequences)) or 0}",
            f"--threads={self.threads}",
            "--depths",
            *map(str, self.depths),
        ]


class Engine(Protocol):
    """An engine under measurement: a context, and what it does with it."""

    about: dict[str, Any]

    def prefill(self, ids: list[int]) -> None:
        """Empty the context, then fill it with `ids`."""

    def decode(self, depth: int, steps: int) -> None:
        """Draw `steps` tokens one after another, the first at position `depth`."""

    def decode_together(self, sequences: int, steps: int) -> None:
        """Empty the context, then draw `steps` tokens in each of so many sequences, in step."""


class Bitllm:
    """The CPU backend of bitllm, as `bitllm bench` runs it."""

    def __init__(self, model: Path, work: Work) -> None:
        from bitllm.backends import get_backend
        from bitllm.backends.base import LoadOptions
        from bitllm.bench.steps import Sequences
        from bitllm.formats import open_checkpoint

        options = LoadOptions(
            kv_tokens=work.context,
            threads=work.threads,
            max_batch_tokens=max(work.prefill, work.together),
        )
        decoder = get_backend("cpu").load(open_checkpoint(model), options)
        self._sequence = Sequences(decoder, 1, work.context, work.prefill)
        self._together = {
            count: Sequences(decoder, count, work.steps, work.prefill) for count in work.sequences
        }
        self.about = {
            "version": importlib.metadata.version("bitllm"),
            "kernel": decoder.info.kernel,
            "packing": decoder.info.packing,
            "head": decoder.info.head,
            "model_bytes": decoder.info.weight_bytes,
        }

    def prefill(self, ids: list[int]) -> None:
        """Positions are overwritten, so there is nothing to empty."""
        self._sequence.prefill(len(ids))

    def decode(self, depth: int, steps: int) -> None:
        """Draw greedily in the decoder."""
        self._sequence.decode(depth, steps)

    def decode_together(self, sequences: int, steps: int) -> None:
        """Draw greedily in the decoder."""
        self._together[sequences].decode(0, steps)


class LlamaCpp:
    """llama.cpp through llama-cpp-python, without its Python layer; the largest logit is drawn."""

    def __init__(self, model: Path, work: Work) -> None:
        self._api: Any = importlib.import_module("llama_cpp")
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self._api.llama_backend_init()
        options = self._api.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = self._api.llama_model_load_from_file(str(model).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {model}")
        context = self._api.llama_context_default_params()
        context.n_ctx = work.context
        context.n_seq_max = work.together
        context.kv_unified = True  # or each sequence could have only its part of the context
        context.n_batch = context.n_ubatch = max(work.prefill, work.together)
        context.n_threads = context.n_threads_batch = work.threads
        self._context = self._api.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {work.context} tokens")
        self._chunk = work.prefill
        self._vocab = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self.about = {
            "version": importlib.metadata.version("llama-cpp-python"),
            "system": self._api.llama_print_system_info().decode(),
            "model_bytes": self._api.llama_model_size(self._model),
        }

    def prefill(self, ids: list[int]) -> None:
        """Only the last token of a step has its logits computed."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        for start in range(0, len(ids), self._chunk):
            self._step(ids[start : start + self._chunk])

    def decode(self, depth: int, steps: int) -> None:
        """Positions go on from the last prompt or token; `depth` only states them."""
        token = 3
        for _ in range(steps):
            self._step([token])
            token = self._likeliest(-1)

    def decode_together(self, sequences: int, steps: int) -> None:
        """One batch a step, with a token of each sequence."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        batch = self._api.llama_batch_init(sequences, 0, 1)
        tokens = [3] * sequences
        for position in range(steps):
            batch.n_tokens = sequences
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, position
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, index
                batch.logits[index] = True
            self._compute(batch)
            tokens = [self._likeliest(index) for index in range(sequences)]
        self._api.llama_batch_free(batch)

    def _likeliest(self, row: int) -> int:
        logits = self._api.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())

    def _step(self, ids: list[int]) -> None:
        array = (self._api.llama_token * len(ids))(*ids)
        self._compute(self._api.llama_batch_get_one(array, len(ids)))

    def _compute(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {batch.n_tokens} tokens")
        self._api.llama_synchronize(self._context)


class Transformers:
    """BitNetForCausalLM of transformers, whose weights are dense in memory; it draws the same."""

    def __init__(self, model: Path, work: Work, dtype: str) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._transformers: Any = importlib.import_module("transformers")
        self._torch.set_num_threads(work.threads)
        self._torch.set_grad_enabled(False)
        loaded = self._transformers.BitNetForCausalLM.from_pretrained(
            model, dtype=self._torch.bfloat16
        ).eval()
        # Loading in float32, or asking the model itself, is refused for quantised models.
        self._model = self._torch.nn.Module.float(loaded) if dtype == "fp32" else loaded
        self._chunk = work.prefill
        self._cache: Any = None
        self.about = {
            "version": importlib.metadata.version("transformers"),
            "torch": importlib.metadata.version("torch"),
            "dtype": dtype,
        }

    def prefill(self, ids: list[int]) -> None:
        """Only the last token of a step has its logits computed."""
        self._cache = self._transformers.DynamicCache()
        for start in range(0, len(ids), self._chunk):
            self._step(ids[start : start + self._chunk])

    def decode(self, depth: int, steps: int) -> None:
        """Positions go on from the cache; `depth` only states them."""
        token = 3
        for _ in range(steps):
            (token,) = self._step([token])

    def decode_together(self, sequences: int, steps: int) -> None:
        """A row of the batch for each sequence."""
        self._cache = self._transformers.DynamicCache()
        tokens = [3] * sequences
        for _ in range(steps):
            tokens = self._step(*([token] for token in tokens))

    def _step(self, *rows: list[int]) -> list[int]:
        ids = self._torch.tensor(rows)
        answer = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        drawn: list[int] = answer.logits[:, -1].argmax(dim=-1).tolist()
        return drawn


ENGINES: dict[str, Callable[[Path, Work], Engine]] = {
    "bitllm": Bitllm,
    "llama-cpp-python": LlamaCpp,
    "transformers-bf16": lambda model, work: Transformers(model, work, "bf16"),
    "transformers-fp32": lambda model, work: Transformers(model, work, "fp32"),
}


def prefill_name(tokens: int) -> str:
    """Return the name of a prefill in the results."""
    return f"prefill {tokens}"


def decode_name(depth: int) -> str:
    """Return the name of a decode run in the results."""
    return f"decode at {depth}"


def together_name(sequences: int) -> str:
    """Return the name of a run of several sequences in the results."""
    return f"decode of {sequences}"


def prompt(tokens: int) -> list[int]:
    """Return ids that are valid in any vocabulary here."""
    return [(7 * position + 3) % 512 for position in range(tokens)]


def measure(engine: Engine, work: Work) -> dict[str, float]:
    """Return tokens a second for each kind of work."""
    engine.prefill(prompt(work.prefill))
    engine.decode(work.prefill, work.steps)
    began = time.perf_counter()
    engine.prefill(prompt(work.prefill))
    speeds = {prefill_name(work.prefill): work.prefill / (time.perf_counter() - began)}
    for depth in work.depths:
        engine.prefill(prompt(depth))
        began = time.perf_counter()
        engine.decode(depth, work.steps)
        speeds[decode_name(depth)] = work.steps / (time.perf_counter() - began)
    for sequences in work.sequences:
        engine.decode_together(sequences, 2)
        began = time.perf_counter()
        engine.decode_together(sequences, work.steps)
        speeds[together_name(sequences)] = sequences * work.steps / (time.perf_counter() - began)
    return speeds


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add the options that state the work."""
    parser.add_argument("--prefill", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--steps", type=positive, default=64, help="tokens of one decode run")
    parser.add_argument(
        "--depths",
        type=natural,
        nargs="+",
        default=[0, 2048],
        metavar="TOKENS",
        help="tokens in the context when a decode run begins",
    )
    parser.add_argument(
        "--sequences",
        type=counts,
        default=(8,),
        metavar="COUNT[,COUNT...]",
        help="sequences decoded side by side, a run for each count; 0 = no such run",
    )
    parser.add_argument("--threads", type=positive, default=1)


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    """Return a whole number, 0 included."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Return whole numbers between commas, without those that are 0."""
    return tuple(count for count in map(natural, text.split(",")) if count)


def work_of(arguments: argparse.Namespace) -> Work:
    """Return the work that the options state."""
    depths = tuple(arguments.depths)
    return Work(arguments.prefill, arguments.steps, depths, arguments.sequences, arguments.threads)


def main() -> None:
    """Parse the command line, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model", type=Path, help="a model directory, or a GGUF file")
    add_work(parser)
    arguments = parser.parse_args()
    work = work_of(arguments)
    try:
        engine = ENGINES[arguments.engine](arguments.model, work)
        speeds = measure(engine, work)
    except Exception as error:
        # The first line says what happened; a hint may follow it.
        reason = (str(error).splitlines() or [""])[0]
        parser.exit(1, f"{type(error).__name__}: {reason}\n")
    print(json.dumps({"about": engine.about, "speeds": speeds}))


if __name__ == "__main__":
    main()

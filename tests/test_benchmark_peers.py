"""The comparison with other engines: what it asks of them, how it reads them, and what it says."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import peer_engines
import peer_gguf
import peers
import pytest
from peer_engines import PeerError, parse_llama_bench, parse_repeat, run
from peer_repeat import Work, add_work, measure, work_of

from bitllm.bench import random_model

TINY = random_model.Shape(hidden=32, ffn=64, layers=2, heads=2, kv_heads=1, head_dim=16, vocab=640)
WORK = Work(prefill=32, steps=4, depths=(0, 48), sequences=(2,), threads=1)

FAKE_LLAMA_BENCH = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
if "--help" in arguments:
    sys.exit(print("options: {options}"))
with pathlib.Path(__file__).with_name("calls").open("a") as calls:
    print(*arguments, file=calls)
if {crash}:
    print("loading the model", "no such tensor", "", sep="\\n", file=sys.stderr)
    sys.exit(3)
value = dict(zip(arguments[::2], arguments[1::2]))
depths = [int(depth) for depth in value.get("-d", "0").split(",")]
tests = [(int(value["-p"]), 0, depth, 100.0) for depth in depths if value["-p"] != "0"]
tests += [(0, int(value["-n"]), depth, 10.0) for depth in depths if value["-n"] != "0"]
print(json.dumps([
    dict(build_commit="abc", n_prompt=p, n_gen=n, n_depth=d, avg_ts=ts, samples_ts=[ts])
    for p, n, d, ts in tests
]))
"""


def llama_bench(folder: Path, options: str = "-d, --n-depth", crash: bool = False) -> Path:
    """A program that answers as llama-bench does, and notes what it was asked."""
    path = folder / "llama-bench"
    path.write_text(FAKE_LLAMA_BENCH.format(python=sys.executable, options=options, crash=crash))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    random_model.write_checkpoint(path, TINY)
    return path


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


# --- what engines answer -------------------------------------------------------------------------


def record(**fields: object) -> dict[str, object]:
    return {"n_prompt": 0, "n_gen": 0, "avg_ts": 1.0, "build_commit": "abc"} | fields


def test_tests_of_llama_bench_are_kinds_of_work() -> None:
    text = json.dumps(
        [
            record(n_prompt=512, samples_ts=[40.0, 30.0, 20.0]),
            record(n_gen=64, avg_ts=14.0),
            record(n_gen=64, n_depth=2048, avg_ts=9.0),
            record(n_prompt=512, n_depth=2048, avg_ts=5.0),
            record(n_prompt=512, n_gen=64, avg_ts=5.0, test="pp512+tg64"),
            record(n_prompt=256, n_gen=64, avg_ts=11.0, test="tg64@pp256"),
        ]
    )
    about, speeds = parse_llama_bench(text)
    assert about["version"] == "abc"
    assert speeds == {
        "prefill 512": 30.0,
        "decode at 0": 14.0,
        "decode at 2048": 9.0,
        "decode at 256": 11.0,
    }


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("llama_model_load: error\n", "not JSON"),
        ('{"n_prompt": 1}', "not that of llama-bench"),
        ('[{"n_prompt": 512}]', "not that of llama-bench"),
        ('[{"n_prompt": 512, "n_gen": 0}]', "not that of llama-bench"),
        ("[1]", "not that of llama-bench"),
        ("3", "not that of llama-bench"),
    ],
)
def test_other_output_of_llama_bench_is_refused(text: str, reason: str) -> None:
    with pytest.raises(PeerError, match=reason):
        parse_llama_bench(text)


def test_the_answer_of_a_repeat_is_its_last_line() -> None:
    text = 'a library says hello\n{"about": {"version": "1"}, "speeds": {"prefill 8": 2}}\n'
    assert parse_repeat(text) == ({"version": "1"}, {"prefill 8": 2.0})
    for broken in ("", "hello", "[]", "{}", '{"about": {}, "speeds": {"prefill 8": "fast"}}'):
        with pytest.raises(PeerError, match="JSON"):
            parse_repeat(broken)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["/nowhere/llama-bench"], "cannot run /nowhere/llama-bench: No such file or directory"),
        (python("raise ValueError('no model')"), "exit status 1: ValueError: no model"),
        (python("raise SystemExit(2)"), "exit status 2: nothing on stderr"),
        (python("import os; os.kill(os.getpid(), 9)"), "killed by SIGKILL: nothing on stderr"),
    ],
)
def test_whatever_goes_wrong_is_one_line(command: list[str], message: str) -> None:
    with pytest.raises(PeerError) as caught:
        run(command)
    assert str(caught.value) == message


def test_a_peer_that_hangs_is_ended() -> None:
    with pytest.raises(PeerError, match=r"took longer than 0\.2 s \(--timeout\)"):
        run(python("import time; time.sleep(60)"), timeout=0.2)


def test_all_engines_are_told_the_threads() -> None:
    assert run(python("import os; print(os.environ['OMP_NUM_THREADS'])"), threads=3) == "3\n"


# --- what engines are asked ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ("-d, --n-depth", ["-p 32 -n 4", "-p 0 -n 4 -d 48"]),
        ("--n-gpu-layers <n> -gp <pp,tg>", ["-p 32 -n 4 -gp 48,4"]),
        ("--n-gpu-layers <n> -pg <pp,tg>", ["-p 32 -n 4"]),
    ],
)
def test_llama_bench_is_asked_for_the_same_work(
    tmp_path: Path, options: str, calls: list[str]
) -> None:
    program = llama_bench(tmp_path, options)
    engine = peer_engines.llama_bench_engine("fake", [str(program)], Path("m.gguf"), WORK)
    engine.repeat(threads=1, timeout=60)
    asked = (tmp_path / "calls").read_text().splitlines()
    assert asked == [f"-m m.gguf -t 1 -o json -r 1 {call}" for call in calls]


@dataclass
class Recorder:
    about: dict[str, object] = field(default_factory=dict)
    calls: list[tuple[int, ...]] = field(default_factory=list)

    def prefill(self, ids: list[int]) -> None:
        self.calls.append((len(ids),))

    def decode(self, depth: int, steps: int) -> None:
        self.calls.append((depth, steps))

    def decode_together(self, sequences: int, steps: int) -> None:
        self.calls.append((-sequences, steps))


def test_a_repeat_warms_up_and_begins_each_run_at_its_depth() -> None:
    engine = Recorder()
    names = {"prefill 32", "decode at 0", "decode at 48", "decode of 2"}
    assert set(measure(engine, WORK)) == names
    assert engine.calls == [(32,), (32, 4), (32,), (0,), (0, 4), (48,), (48, 4), (-2, 2), (-2, 4)]
    assert WORK.context == 2 * (4 + 32)
    alone = Recorder()
    assert set(measure(alone, replace(WORK, sequences=()))) == names - {"decode of 2"}
    assert alone.calls == engine.calls[:-2]


def test_several_counts_of_sequences_are_a_run_each() -> None:
    parser = argparse.ArgumentParser()
    add_work(parser)
    for sequences in ((1, 4, 32), (8,), ()):
        work = replace(WORK, sequences=sequences)
        assert work_of(parser.parse_args(work.options())) == work
    wide = replace(WORK, sequences=(1, 4, 32))
    assert wide.context == 32 * (4 + 32)
    speeds = measure(Recorder(), wide)
    assert {"decode of 1", "decode of 4", "decode of 32"} < set(speeds)


@dataclass
class FakeEngine:
    name: str
    speeds: list[float]
    order: list[str]

    def repeat(self, threads: int, timeout: float) -> peer_engines.Answer:
        self.order.append(self.name)
        if not self.speeds:
            raise PeerError("out of speed")
        return {}, {"prefill 32": self.speeds.pop(0)}


def test_repeats_alternate_and_ratios_are_taken_within_a_repeat() -> None:
    order: list[str] = []
    samples = {"bitllm": [30.0, 60.0, 20.0], "slow": [10.0, 30.0, 5.0], "weak": [15.0]}
    found = peers.Field([FakeEngine(name, list(speeds), order) for name, speeds in samples.items()])
    outcomes = peers.alternate(found, WORK, repeats=3, timeout=1)
    assert order == ["bitllm", "slow", "weak", "bitllm", "slow", "weak", "bitllm", "slow"]
    assert found.failed == {"weak": "out of speed"}
    rows = {row["engine"]: row for row in peers.figures(outcomes, WORK) if row["samples"]}
    assert "ratio" not in rows["bitllm"]
    assert (rows["bitllm"]["tokens_per_s"], rows["bitllm"]["spread"]) == (30.0, 40 / 30)
    assert [rows["slow"][name] for name in ("ratio", "lowest", "highest")] == [3.0, 2.0, 4.0]
    assert rows["weak"]["ratio"] == 2.0


# --- the whole script ----------------------------------------------------------------------------


def options(model: Path, *more: str) -> list[str]:
    return ["peers.py", str(model), *WORK.options(), "--repeats", "2", *more]


def test_bitllm_beside_a_llama_bench(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m.gguf").touch()
    (tmp_path / "bad").mkdir()
    good, bad = llama_bench(tmp_path), llama_bench(tmp_path / "bad", crash=True)
    given = [
        ["--peer", f"{name}={program} -fa 1", str(tmp_path / "m.gguf")]
        for name, program in {"good": good, "bad": bad}.items()
    ]
    arguments = options(model, "--packages", "llama-cpp-python", *given[0], *given[1])
    monkeypatch.setattr(peers, "missing_packages", lambda python, package: ["gguf"])
    monkeypatch.setattr(sys, "argv", arguments)
    assert peers.main() == 1
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])
    assert result["failed"] == {"bad": "exit status 3: no such tensor"}
    assert "pip install --no-binary llama-cpp-python" in result["skipped"]["llama-cpp-python"]
    assert re.search(r"skipped: llama-cpp-python +no gguf; install: ", text)
    assert re.search(r"prefill 32, good +100\.00 tok/s \(spread 0\.0%\); bitllm/peer ", text)
    assert re.search(r"decode at 48, bad +not measured", text)
    rows = {(row["work"], row["engine"]): row for row in result["figures"]}
    ours, theirs = rows["decode at 48", "bitllm"], rows["decode at 48", "good"]
    assert len(ours["samples"]) == 2
    assert theirs["samples"] == [10.0, 10.0]
    assert theirs["ratio"] == pytest.approx(ours["tokens_per_s"] / 10)


def test_json_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", options(model, "--packages", "--repeats", "1", "--json"))
    assert peers.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["engine"] for row in result["figures"]] == ["bitllm"] * 4


def test_without_figures_of_bitllm_there_is_no_comparison(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    monkeypatch.setattr(sys, "argv", options(tmp_path, "--packages"))
    assert peers.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("peers.py: bitllm: exit status 1: CheckpointError: ")
    assert "hint" not in last


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--peer", "x", "m.gguf"], "--peer needs NAME=PROGRAM, not 'x'"),
        (["--peer", "x=/nowhere/bench", "m.gguf"], "--peer x: no program '/nowhere/bench'"),
        (["--peer", f"x={sys.executable}", "no.gguf"], "--peer x: no model file no.gguf"),
        (["--peer-python", "numpy=python"], "'numpy' is none of llama-cpp-python, transformers"),
        (["--peer-python", "transformers=/nowhere/python"], "no program '/nowhere/python'"),
        (["--repeats", "0"], "invalid positive value: '0'"),
        (["--depths", "-1"], "invalid natural value: '-1'"),
    ],
)
def test_what_can_be_checked_is_checked_before_anything_runs(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(sys, "argv", options(model, *more))
    with pytest.raises(SystemExit, match="2"):
        peers.main()
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_model_is_told_with_the_line_that_writes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", options(tmp_path / "2b"))
    with pytest.raises(SystemExit, match="2"):
        peers.main()
    assert "python benchmarks/make_checkpoint.py" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", options(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        peers.main()
    assert "states no shape" in capsys.readouterr().err.splitlines()[-1]


# --- GGUF files ----------------------------------------------------------------------------------


def test_the_bytes_of_tq1_0_hold_all_ternary_digits() -> None:
    powers = np.array([1, 3, 9, 27, 81])
    for digits, table in ((5, peer_gguf.FIVE_CODES), (4, peer_gguf.FOUR_CODES)):
        codes = (table[:, None].astype(int) * powers[:digits] % 256 * 3) >> 8
        assert set(codes.ravel()) == {0, 1, 2}
        assert len({tuple(row) for row in codes}) == 3**digits


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0", "Q6_K", "F16", "F32"])
def test_a_tensor_has_the_bytes_that_the_file_announces(kind: str) -> None:
    shape = (512,) if kind == "F32" else (6, 512)
    entry = peer_gguf.Entry("x", shape, kind)
    contents = peer_gguf.data(entry, np.random.default_rng(0))
    assert contents.nbytes == peer_gguf.row_bytes(entry) * (len(contents) if len(shape) > 1 else 1)
    assert contents.shape[0] == shape[0]


def test_the_gguf_file_has_the_weights_of_the_checkpoint() -> None:
    shape = random_model.SHAPES["2b"]
    peer_gguf.check(shape)
    tensors = list(peer_gguf.entries(shape, "TQ2_0", "Q6_K"))
    count = sum(int(np.prod(entry.shape)) for entry in tensors)
    assert count == 2_412_820_480
    name = peer_gguf.file_name(shape, "TQ2_0", "Q6_K")
    assert name == "bitnet-30x2560x6912-20-5-128256-TQ2_0-Q6_K.gguf"


def test_the_shape_is_that_of_the_checkpoint(model: Path) -> None:
    assert peer_gguf.read_shape(model) == TINY
    with pytest.raises(ValueError, match="multiples of 256, not 32"):
        peer_gguf.check(TINY)

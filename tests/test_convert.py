"""`bitllm convert`: from any format to any, read back equal; refusals; what verification finds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from bitllm.checkpoint import Checkpoint, TernaryMatrix
from bitllm.cli.app import app
from bitllm.convert import plan_conversion, run_conversion
from bitllm.convert.verify import verify
from bitllm.engine.loading import open_tokenizer
from bitllm.errors import CheckpointError, ConfigError, ConversionError, UnsupportedModelError
from bitllm.formats import open_checkpoint
from bitllm.formats.gguf.container import GgufFile
from bitllm.formats.writers import write_directory, write_file
from bitllm.formats.writers.differences import spec_differences
from bitllm.formats.writers.gguf import plan_gguf
from bitllm.formats.writers.mlx import plan_mlx
from bitllm.formats.writers.texts import ModelTexts
from interrupted import process_to_interrupt
from model_directories import (
    SUB_NORMS,
    published,
    same_weights,
    sized_spec,
    write_huggingface,
)
from synthetic import MemorySource, random_checkpoint

BITNET = {**SUB_NORMS, "activation": "relu2", "tied_head": True}
SOURCES: dict[str, dict[str, Any]] = {
    "bitnet": {"convention": "multiply", **BITNET},
    "1bitllm": {"convention": "multiply", **SUB_NORMS, "activation": "silu", "tied_head": True},
    "llama": {"convention": "divide", "activation": "silu"},
    "llama_multiply": {"convention": "multiply", "activation": "silu"},
    "qwen3": {"convention": "divide", "activation": "silu", "qk_norm": True},
}
TARGETS: dict[str, dict[str, Any]] = {
    "huggingface": {},
    "i2_s.gguf": {"kind": "i2_s"},
    "tq2_0.gguf": {"kind": "tq2_0"},
    "tq1_0.gguf": {"kind": "tq1_0"},
    "mlx": {"to": "mlx"},
}
EXACT = ("huggingface", "i2_s.gguf", "mlx")
TEXTS = [
    "naïve café, Straße, 你好 мир 🙂",
    "the list<|eot_id|> of 12345 <tool>",
    "",
    "\x00\r\n\t  x",
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BITLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BITLLM_DEVICE", "reference")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_huggingface(folder / name, **fields) for name, fields in SOURCES.items()}


def convert(source: Path, target: Path, **options: Any) -> Path:
    result = run_conversion(plan_conversion(source, target, **options))
    assert result.verification is not None
    assert result.verification.logits_error is not None
    if not plan_errors(source, target, **options):
        assert result.verification.scale_error == 0
        assert result.verification.logits_error == 0
    return target


def plan_errors(source: Path, target: Path, **options: Any) -> Any:
    return plan_conversion(source, target, **{**options, "replace": True}).plan.errors


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_code_and_the_tokenizer_arrive(
    source: str, target: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    origin = sources[source]
    goal = convert(origin, tmp_path / target, **TARGETS[target])
    before, after = open_checkpoint(origin), open_checkpoint(goal)
    assert spec_differences(before.spec, after.spec) == []
    if target in EXACT:
        same_weights(before, after)
    for name, _ in before.spec.linear_names():
        assert (before.ternary(name).packed == after.ternary(name).packed).all()
    one, two = open_tokenizer(origin), open_tokenizer(goal)
    for text in TEXTS:
        assert one.encode(text) == two.encode(text)
    assert (one.bos_id, one.stop_ids) == (two.bos_id, two.stop_ids)
    messages = [{"role": "user", "content": "hi"}]
    assert one.encode_chat(messages) == two.encode_chat(messages)


@pytest.mark.parametrize(
    "way",
    [*itertools.permutations(("i2_s.gguf", "mlx"), 1), ("i2_s.gguf", "mlx"), ("mlx", "i2_s.gguf")],
)
@pytest.mark.parametrize("source", SOURCES)
def test_the_way_round_gives_the_same_weights_file(
    source: str, way: tuple[str, ...], sources: dict[str, Path], tmp_path: Path
) -> None:
    """Through other formats and back: the very bytes of the safetensors file."""
    place = sources[source]
    for number, step in enumerate(way):
        place = convert(place, tmp_path / f"{number}-{step}", **TARGETS[step])
    convention = SOURCES[source]["convention"]
    back = convert(place, tmp_path / "back", to="huggingface", convention=convention)
    name = "model.safetensors"
    assert (back / name).read_bytes() == (sources[source] / name).read_bytes()


@pytest.mark.parametrize("target", ["out.gguf", "out"])
@pytest.mark.parametrize("bits", [8, None])
def test_unquantised_activations_are_told(bits: int | None, target: str, tmp_path: Path) -> None:
    """Llamas with ternary weights alone (TriLM, Bonsai) beside those of BitNet."""
    original = published(
        random_checkpoint(sized_spec(101, activation="silu", activation_bits=bits))
    )
    if target == "out":
        write_directory(tmp_path / target, plan_mlx(original, ModelTexts()).files)
    else:
        write_file(tmp_path / target, plan_gguf(original, "out", "tq2_0").files[0])
    found = open_checkpoint(tmp_path / target)
    assert spec_differences(original.spec, found.spec) == []
    assert found.spec.layers[1].down.activation_bits == bits
    same_weights(original, found)


@pytest.mark.parametrize("target", ["out.gguf", "out"])
@pytest.mark.parametrize("group", [256, 512, 768])
def test_groups_that_end_beyond_a_row(group: int, target: str, tmp_path: Path) -> None:
    spec = sized_spec(101, activation="silu", ffn_size=1280)
    original = random_checkpoint(spec, granularity="group", group_size=group)
    kind = plan_gguf(original, "out", "tq1_0") if target == "out.gguf" else None
    plan = kind or plan_mlx(original, ModelTexts())
    if kind is None:
        write_directory(tmp_path / target, plan.files)
    else:
        write_file(tmp_path / target, plan.files[0])
    found = verify(original, plan, tmp_path / target)
    assert (found.scale_error == 0) == (target == "out")
    assert found.scale_error < 2**-11


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="bitllm")


def test_the_command_prints_tensors_and_what_was_compared(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    result = command(sources["bitnet"], tmp_path / "out", "--convention", "divide")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "from    bitnet (BitNetForCausalLM)"
    row = next(line for line in lines if line.startswith("mlp.down_proj.weight "))
    assert row.split() == ["mlp.down_proj.weight", "U8", "2", "64", "x", "512", "65.5", "kB"]
    assert any(line.startswith("scales  ") and "rounded" in line for line in lines)
    assert "14 matrices: codes equal, scales off by" in lines[-1]
    assert result.stderr == ""


def test_the_command_as_json(sources: dict[str, Path], tmp_path: Path) -> None:
    result = command(sources["bitnet"], tmp_path / "out", "--json")
    found = json.loads(result.stdout)
    size = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert found["bytes"] == size == sum(file["bytes"] for file in found["files"])
    assert len(found["tensors"]) == 2 + 2 * (4 + 14)
    assert found["verification"] == {
        "matrices": 14,
        "dense": 10,
        "scale_error": 0.0,
        "logits_error": 0.0,
        "logits_skipped": None,
    }


def test_no_verify_reads_nothing_back(sources: dict[str, Path], tmp_path: Path) -> None:
    result = command(sources["bitnet"], tmp_path / "out", "--no-verify", "--json")
    assert json.loads(result.stdout)["verification"] is None
    same_weights(open_checkpoint(sources["bitnet"]), open_checkpoint(tmp_path / "out"))


def test_an_existing_target_needs_force(sources: dict[str, Path], tmp_path: Path) -> None:
    convert(sources["llama"], tmp_path / "out")
    again = command(sources["bitnet"], tmp_path / "out")
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert open_checkpoint(tmp_path / "out").spec.architecture == "LlamaForCausalLM"
    forced = command(sources["bitnet"], tmp_path / "out", "--force")
    assert forced.exit_code == 0, forced.stderr
    assert open_checkpoint(tmp_path / "out").spec.architecture == "BitNetForCausalLM"


def test_force_replaces_no_directory_that_is_no_model(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    result = command(sources["bitnet"], tmp_path / "home", "--force")
    assert result.exit_code == 1
    assert "is no model directory" in result.stderr
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "d.gguf").mkdir()
    assert "is no file" in command(sources["bitnet"], tmp_path / "d.gguf", "--force").stderr


def test_the_source_is_never_the_target(sources: dict[str, Path], tmp_path: Path) -> None:
    source = convert(sources["bitnet"], tmp_path / "model")
    for target in (source, source / "..", tmp_path / "link"):
        if target.name == "link":
            target.symlink_to(source)
        result = command(source, target, "--force")
        assert result.exit_code == 1
        assert "holds the model that is to be converted" in result.stderr
    same_weights(open_checkpoint(sources["bitnet"]), open_checkpoint(source))


@pytest.mark.parametrize("name", ["x.gguf", "x-00001-of-00001.gguf"])
def test_a_gguf_file_of_the_source_directory_is_never_the_target(
    name: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    file = convert(sources["bitnet"], tmp_path / "model" / name)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = file.read_bytes()
    for target in (file, tmp_path / "link" / name):
        result = command(tmp_path / "model", target, "--force", "--type", "tq2_0")
        assert result.exit_code == 1
        assert "holds the model that is to be converted" in result.stderr
    assert file.read_bytes() == before


def test_a_directory_that_the_source_links_to_is_never_the_target(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    model = convert(sources["bitnet"], tmp_path / "model")
    (tmp_path / "linked").mkdir()
    for file in model.iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    result = command(tmp_path / "linked", model, "--force")
    assert "holds the model that is to be converted" in result.stderr
    assert command(tmp_path / "linked", tmp_path / "linked" / "own.gguf").exit_code == 0
    again = command(tmp_path / "linked", tmp_path / "linked" / "own.gguf", "--force")
    assert again.exit_code == 0, again.stderr


def test_links_in_a_circle_and_names_that_are_no_text(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert "exists already" in command(sources["bitnet"], tmp_path / "circle").stderr
    inside = command(sources["bitnet"], tmp_path / "circle" / "x.gguf")
    assert "there is no directory" in inside.stderr
    named = convert(sources["bitnet"], tmp_path / os.fsdecode(b"a\xff.gguf"))
    assert GgufFile(named).metadata["general.name"] == "a\ufffd"


def test_a_target_in_the_way_is_seen_before_weights_are_read(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for target, message in (("out", "exists already"), ("a/b.gguf", "there is no directory")):
        with pytest.raises(CheckpointError, match=message):
            plan_conversion(sources["bitnet"], tmp_path / target)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("out", {"to": "gguf"}, "does not go with the format gguf"),
        ("out.gguf", {"to": "mlx"}, "does not go with the format mlx"),
        ("out", {"kind": "i2_s"}, "chosen for GGUF files"),
        ("out.gguf", {"convention": "divide"}, "chosen for huggingface"),
    ],
)
def test_options_that_contradict_each_other(
    target: str, options: Any, message: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_conversion(sources["bitnet"], tmp_path / target, **options)


def test_a_refusal_writes_nothing(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", **BITNET, hidden_size=320)
    with pytest.raises(UnsupportedModelError, match="rows of 320 weights"):
        plan_conversion(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("target", TARGETS)
def test_an_embedding_model_is_refused_as_one(target: str, tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "embedding", convention="divide", activation="silu")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    assert open_checkpoint(source).spec.pooling == "last"
    with pytest.raises(UnsupportedModelError, match="embedding models are read, but not") as caught:
        plan_conversion(source, tmp_path / target, **TARGETS[target])
    assert "another format" not in str(caught.value.hint)


def test_a_source_that_breaks_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    source = write_huggingface(tmp_path / "one", **BITNET)
    weights = source / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] = 0xFF  # the code 3, in the last matrix
    weights.write_bytes(content)
    result = command(source, tmp_path / "out")
    assert result.exit_code == 1
    assert "code 3" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def changed(checkpoint: Checkpoint, **tensors: Any) -> Checkpoint:
    """The checkpoint in memory, with some tensors replaced."""
    spec = checkpoint.spec
    dense = {name: checkpoint.dense(name) for name in spec.dense_shapes()}
    ternary = {name: checkpoint.ternary(name) for name, _ in spec.linear_names()}
    for name, tensor in tensors.items():
        (ternary if isinstance(tensor, TernaryMatrix) else dense)[name] = tensor
    return Checkpoint(spec, MemorySource(dense, ternary), "changed")


def test_verification_finds_a_code_a_scale_a_value_and_a_switch(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    conversion = plan_conversion(sources["bitnet"], tmp_path / "out")
    run_conversion(conversion)
    original = open_checkpoint(tmp_path / "out")
    matrix = original.ternary("layers.1.up")
    codes = matrix.codes()
    codes[511, 255] = 1 if codes[511, 255] != 1 else -1
    wrong_code = dataclasses.replace(
        matrix, packed=TernaryMatrix.from_codes(codes, matrix.scales).packed
    )
    wrong_scale = dataclasses.replace(
        matrix, scales=np.nextafter(matrix.scales, np.float32(9)), source_scales=None
    )
    embed = original.dense("embed")
    bits = embed.data.copy()
    bits[-1, -1] ^= 1
    wrong_value = dataclasses.replace(embed, data=bits)
    cases = [
        (changed(original, **{"layers.1.up": wrong_code}), r"codes of layers\.1\.up"),
        (changed(original, **{"layers.1.up": wrong_scale}), r"scales of layers\.1\.up"),
        (changed(original, embed=wrong_value), "values of embed"),
        (
            dataclasses.replace(original, spec=dataclasses.replace(original.spec, max_context=9)),
            "max_context",
        ),
    ]
    for source, message in cases:
        with pytest.raises(ConversionError, match=message):
            verify(source, conversion.plan, tmp_path / "out")


def test_a_result_that_is_found_wrong_gets_no_name(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitllm.formats.writers import huggingface

    right = huggingface.row_strided

    def wrong(packed: Any, in_features: int) -> Any:
        for band in right(packed, in_features):
            yield band[::-1]

    monkeypatch.setattr(huggingface, "row_strided", wrong)
    result = command(sources["bitnet"], tmp_path / "out")
    assert result.exit_code == 1
    assert "not what was to be written: codes of layers.0.q" in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_without_a_device_the_tensors_are_compared_all_the_same(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITLLM_DEVICE", "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = command(sources["bitnet"], tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "no logits computed: the cuda device needs an NVIDIA GPU" in result.stdout


LIMITED = """
import resource, sys
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))
sys.argv = ["bitllm", "convert", *sys.argv[1:]]
from bitllm.cli import main
try:
    main()
finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)  # what measures coverage writes at the end
"""


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_is_one_clear_error(
    target: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    options = {"mlx": ["--to", "mlx"]}.get(target, [])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, sources["bitnet"], tmp_path / target, *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "no space left to write it" in done.stderr
    assert "Traceback" not in done.stderr
    assert [*tmp_path.iterdir()] == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 200_000


SLOW = """
import sys, time
from bitllm.formats.writers import atomic
write = atomic._write_chunk
def slowly(*arguments):
    print("chunk", flush=True)
    time.sleep(5)
    return write(*arguments)
atomic._write_chunk = slowly
sys.argv = ["bitllm", "convert", *sys.argv[1:]]
from bitllm.cli import main
main()
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupt_leaves_nothing_behind(
    number: signal.Signals, status: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", SLOW, str(sources["bitnet"]), str(tmp_path / "out")]
    with process_to_interrupt(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline() != b"chunk\n":
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(60) == status
    assert [*tmp_path.iterdir()] == []

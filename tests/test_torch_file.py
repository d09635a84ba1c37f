"""pytorch_model.bin: the same tensors as in safetensors, and pickles that would run code."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitllm.errors import (
    CheckpointError,
    FormatError,
    MissingTensorError,
    TensorShapeError,
    UnsupportedModelError,
)
from bitllm.formats import torch_file
from bitllm.formats.safetensors import SafetensorsFile
from bitllm.formats.torch_file import TorchFile
from bitllm.formats.weight_files import open_weight_files

TENSORS = {
    "half": torch.randn(3, 5).half(),
    "bfloat": torch.randn(4, 2).bfloat16(),
    "single": torch.randn(7),
    "bytes": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
}


def saved(directory: Path, held: Any, **options: Any) -> Path:
    path = directory / "pytorch_model.bin"
    torch.save(held, path, **options)
    return path


def test_the_tensors_are_those_of_safetensors(tmp_path: Path) -> None:
    ours = TorchFile(saved(tmp_path, TENSORS))
    save_file(TENSORS, tmp_path / "model.safetensors")
    theirs = SafetensorsFile(tmp_path / "model.safetensors")
    assert ours.entries.keys() == theirs.entries.keys()
    for name in TENSORS:
        one, other = ours.entry(name), theirs.entry(name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.stop - one.start == other.stop - other.start
        assert ours.array(name).dtype == theirs.array(name).dtype
        assert np.array_equal(ours.array(name), theirs.array(name))
    for name in ("half", "bfloat", "single"):
        assert np.array_equal(ours.dense(name).to_float32(), theirs.dense(name).to_float32())
        assert ours.dense(name).dtype == theirs.dense(name).dtype


def test_parameters_are_tensors(tmp_path: Path) -> None:
    held = torch.nn.Linear(3, 2).state_dict(keep_vars=True)
    assert isinstance(held["weight"], torch.nn.Parameter)
    file = TorchFile(saved(tmp_path, held))
    assert np.array_equal(file.array("weight"), held["weight"].detach().numpy())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_file_is_mapped_and_not_read(tmp_path: Path) -> None:
    path = saved(tmp_path, {"big": torch.ones(64 << 20, dtype=torch.uint8)})
    before = memory_of_its_own()
    file = TorchFile(path)
    assert file.array("big").size == 64 << 20
    assert memory_of_its_own() - before < 32 << 10


def memory_of_its_own() -> int:
    """KiB of this process that are no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Hostile:
    """Would make a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.ones(2), "hook": Hostile(tmp_path / "ran")})
    with pytest.raises(FormatError, match=r"pytorch_model\.bin") as caught:
        TorchFile(path)
    assert "safetensors" in str(caught.value.hint)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()  # the pickle does what it says


def test_a_bare_pickle_is_not_even_opened(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    with pytest.raises(FormatError, match="no file of torch"):
        TorchFile(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "held",
    [
        {},
        [torch.ones(2)],
        torch.ones(3),
        {"model": {"weight": torch.ones(2)}},
        {"step": 3},
        {1: torch.ones(2)},
        {"weight": torch.ones(4, 6).T},
        {"weight": torch.ones(1).expand(1 << 40)},
        {"weight": torch.eye(3).to_sparse()},
        {"weight": torch.ones(2, dtype=torch.complex64)},
        {"weight": torch.empty(3, device="meta")},
        {"weight": torch.tensor([1 + 2j]).conj().imag},  # negated when it is read
    ],
)
def test_what_is_no_dictionary_of_plain_tensors(tmp_path: Path, held: Any) -> None:
    with pytest.raises(FormatError, match=r"pytorch_model\.bin"):
        TorchFile(saved(tmp_path, held))


def test_truncations(tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 61), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            TorchFile(path)


def test_flipped_bytes_are_errors_or_other_numbers(tmp_path: Path) -> None:
    path = saved(tmp_path, TENSORS)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 150):
        damaged = bytearray(whole)
        damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with suppress(CheckpointError):  # and nothing else may be raised
            file = TorchFile(path)
            for name in file.entries:
                file.array(name)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    plain = saved(tmp_path, TENSORS)
    packed = tmp_path / "packed.bin"
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for member in source.infolist():
            target.writestr(member.filename, source.read(member))
    with pytest.raises(FormatError, match="compressed"):
        TorchFile(packed)


def test_missing_and_wrong_tensors(tmp_path: Path) -> None:
    file = TorchFile(saved(tmp_path, TENSORS))
    with pytest.raises(MissingTensorError, match="'none'"):
        file.entry("none")
    with pytest.raises(TensorShapeError, match="'bytes' should be F32"):
        file.dense("bytes")
    with pytest.raises(CheckpointError, match="No such file"):
        TorchFile(tmp_path / "nowhere.bin")


def test_shards(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"half": TENSORS["half"]}, tmp_path / names[0])
    torch.save({"single": TENSORS["single"]}, tmp_path / names[1])
    index = {"weight_map": {"half": names[0], "single": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    files = open_weight_files(tmp_path)
    assert np.array_equal(files["half"].array("half"), TENSORS["half"].numpy())
    assert np.array_equal(files["single"].array("single"), TENSORS["single"].numpy())


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    saved(tmp_path, {"old": torch.ones(1)})
    save_file({"safe": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(open_weight_files(tmp_path)) == ["safe"]


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, TENSORS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UnsupportedModelError, match="PyTorch, which is not installed") as caught:
        TorchFile(path)
    assert "pip install" in str(caught.value.hint)


def test_versions_whose_loader_could_be_fooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, TENSORS)
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    with pytest.raises(UnsupportedModelError, match=r"2\.5\.1 cannot load it safely"):
        torch_file.TorchFile(path)

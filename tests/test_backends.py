"""Which device runs: names, the environment, and what is said about devices that are missing."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest

from bitllm import backends
from bitllm.backends import DEVICE_VARIABLE, DEVICES, choose_device, get_backend
from bitllm.backends.base import LoadOptions
from bitllm.errors import BackendUnavailableError, ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_NVIDIA_GPUS", Path("/nowhere"))


@pytest.mark.parametrize("device", ["auto", None, ""])
def test_auto_takes_the_cpu_and_says_so(device):
    choice = choose_device(device)
    assert choice.name == "cpu"
    assert "auto" in choice.reason


@pytest.mark.parametrize(("library", "name"), [("libtorch_cuda.so", "cuda"), ("other", "cpu")])
def test_auto_takes_a_gpu_that_the_installed_pytorch_can_use(monkeypatch, tmp_path, library, name):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / library).touch()
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(backends, "_NVIDIA_GPUS", tmp_path)
    assert choose_device().name == name
    assert "NVIDIA GPU" in choose_device().reason


def test_a_gpu_without_pytorch_is_named_and_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backends, "_NVIDIA_GPUS", tmp_path)
    assert choose_device().name == "cpu"
    assert "install a CUDA build of PyTorch" in choose_device().reason


def test_the_environment_decides_where_no_argument_does(monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "reference")
    assert choose_device().name == "reference"
    assert DEVICE_VARIABLE in choose_device().reason
    assert get_backend().name == "reference"


def test_an_argument_beats_the_environment(monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "cuda")
    choice = choose_device("reference")
    assert (choice.name, choice.reason) == ("reference", "asked for")


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_that_says_nothing_is_auto(monkeypatch, value):
    monkeypatch.setenv(DEVICE_VARIABLE, value)
    assert choose_device().name == "cpu"


@pytest.mark.parametrize(("device", "library"), [("cuda", "torch"), ("mlx", "mlx.core")])
def test_a_device_whose_library_is_missing_names_the_install_line(monkeypatch, device, library):
    for name in [name for name in sys.modules if name.startswith(f"bitllm.backends.{device}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BackendUnavailableError, match=f"the {device} backend") as caught:
        get_backend(device)
    assert f"pip install 'bitllm[{device}]'" in caught.value.hint


def test_an_unknown_name_is_refused_with_the_choice_there_is():
    with pytest.raises(ConfigError, match="'tpu', asked for") as caught:
        get_backend("tpu")
    assert all(name in caught.value.hint for name in DEVICES)


def test_an_unknown_name_in_the_environment_is_traced_to_it(monkeypatch):
    monkeypatch.setenv(DEVICE_VARIABLE, "gpu")
    with pytest.raises(ConfigError, match="'gpu', set by BITLLM_DEVICE"):
        choose_device()


def test_a_backend_that_cannot_be_imported_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitllm.backends.cpu", None)
    with pytest.raises(BackendUnavailableError, match="cpu backend") as caught:
        get_backend()
    assert "pip install 'bitllm'" in caught.value.hint


@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_backend_bears_its_name(device):
    assert get_backend(device).name == device


@pytest.mark.parametrize(
    "wrong",
    [
        {"kv_dtype": "fp16"},
        {"kv_tokens": 0},
        {"threads": -1},
        {"threads": True},
        {"max_batch_tokens": 1.5},
    ],
)
def test_load_options_check_themselves(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LoadOptions(**wrong)

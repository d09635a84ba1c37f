"""Which device runs: names, the environment, and what is said about devices that are missing."""

from __future__ import annotations

import importlib.util
import platform
import sys
from pathlib import Path

import pytest

from bitllm import backends
from bitllm.backends import DEVICE_VARIABLE, DEVICES, choose_device, get_backend
from bitllm.backends.base import LoadOptions
from bitllm.cli.run import run
from bitllm.errors import BackendUnavailableError, ConfigError


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(DEVICE_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backends, "_NVIDIA_GPUS", Path("/nowhere"))


def on_a_mac(monkeypatch, machine="arm64", with_mlx=True):
    found = importlib.util.find_spec
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: with_mlx or None if name == "mlx" else found(name)
    )


@pytest.mark.parametrize("device", ["auto", None, ""])
def test_auto_takes_the_cpu_and_says_so(device):
    choice = choose_device(device)
    assert choice.name == "cpu"
    assert "auto" in choice.reason


def test_auto_takes_the_gpu_of_a_mac_where_mlx_is_installed(monkeypatch):
    on_a_mac(monkeypatch)
    choice = choose_device()
    assert (choice.name, "MLX is installed" in choice.reason) == ("mlx", True)
    assert choose_device("cpu").name == "cpu"
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert choose_device().name == "cpu"


def test_auto_says_what_a_mac_lacks(monkeypatch):
    on_a_mac(monkeypatch, with_mlx=False)
    assert choose_device().name == "cpu"
    assert "pip install 'bitllm[mlx]'" in choose_device().reason


def test_auto_leaves_macs_with_intel_to_the_cpu(monkeypatch):
    on_a_mac(monkeypatch, machine="x86_64")
    assert choose_device().name == "cpu"
    assert "mlx" not in choose_device().reason


def test_the_command_line_names_every_device():
    (shown,) = [each for each in run.params if each.name == "device"]
    assert shown.metavar.split("|") == [*DEVICES]


def test_an_nvidia_gpu_has_to_be_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "_NVIDIA_GPUS", tmp_path)
    assert choose_device().name == "cpu"
    assert "device='cuda'" in choose_device().reason


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

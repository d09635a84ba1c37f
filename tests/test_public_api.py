"""What `import bitllm` promises: names, and next to no cost."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

import bitllm
from bitllm import errors

HEAVY = ("tokenizers", "jinja2", "torch", "transformers", "huggingface_hub", "rich", "click")


def run_python(code: str) -> list[str]:
    """Run code in a fresh interpreter; return the names of the modules it leaves loaded."""
    code += "\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return names


def test_all_is_sorted_and_importable() -> None:
    upper = [name for name in bitllm.__all__ if name.isupper()]
    classes = [name for name in bitllm.__all__ if name[0].isupper() and not name.isupper()]
    rest = [name for name in bitllm.__all__ if not name[0].isupper()]
    assert bitllm.__all__ == [*sorted(upper), *sorted(classes), *sorted(rest)]
    for name in bitllm.__all__:
        assert getattr(bitllm, name) is not None
    assert set(bitllm.__all__) <= set(dir(bitllm))


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(bitllm.__all__)
    assert all(getattr(bitllm, name) is getattr(errors, name) for name in errors.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        bitllm.lod  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bitllm.__version__ == importlib.metadata.version("bitllm")
    monkeypatch.delitem(vars(bitllm), "__version__")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert bitllm.__version__ == "0+source"
    monkeypatch.delitem(vars(bitllm), "__version__")


def test_importing_bitllm_imports_nothing_heavy() -> None:
    loaded = run_python("import bitllm")
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]
    assert [name for name in loaded if name.startswith("bitllm")] == ["bitllm"]


def test_names_that_need_no_model_load_no_backend() -> None:
    loaded = run_python("from bitllm import SamplingParams, Completion, BitllmError")
    assert "bitllm._native" not in loaded
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]


def test_importing_load_does_not_load_the_native_module() -> None:
    loaded = run_python("from bitllm import load, LLM")
    assert "bitllm._native" not in loaded
    heavy = ("torch", "transformers", "huggingface_hub", "jinja2", "tokenizers", "rich")
    assert not [name for name in loaded if name.partition(".")[0] in heavy]

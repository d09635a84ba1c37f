"""From a model reference to a directory: a local path, a model of the Hugging Face Hub, or nothing.

A reference is, in this order: an existing local path; `org/name`, `org/name@revision`, either with
`hf:` before it; None, the embedded demo model. The Hub is reached through huggingface_hub, which
is imported only then: its cache and its HF_* variables hold.
"""

from __future__ import annotations

import difflib
import errno
import importlib.resources
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from bitllm.errors import (
    BitllmError,
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from bitllm.formats.json_file import read_json_object

__all__ = ["KNOWN_MODELS", "ModelFiles", "resolve_model"]

KNOWN_MODELS = (
    "microsoft/bitnet-b1.58-2B-4T",
    "microsoft/bitnet-b1.58-2B-4T-bf16",
    "HF1BitLLM/Llama3-8B-1.58-100B-tokens",
    "tiiuae/Falcon3-1B-Instruct-1.58bit",
    "tiiuae/Falcon3-3B-Instruct-1.58bit",
    "tiiuae/Falcon3-7B-Instruct-1.58bit",
    "tiiuae/Falcon3-10B-Instruct-1.58bit",
    "tiiuae/Falcon-E-1B-Instruct",
    "tiiuae/Falcon-E-3B-Instruct",
    "1bitLLM/bitnet_b1_58-large",
    "1bitLLM/bitnet_b1_58-3B",
)
"""Published models in a supported format, to suggest after a typing error."""

_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
]
_MODEL_FILES = frozenset({*_SMALL_FILES, "model.safetensors"})
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"

_HUB_REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the files of a model are.

    Attributes:
        path: the directory, or the GGUF file.
        name: what to call the model: `org/name`, or the directory's name.
        origin: where it came from, for people to read.
        is_demo: it is the embedded demo model.
    """

    path: Path
    name: str
    origin: str
    is_demo: bool = False


def resolve_model(
    ref: str | PathLike[str] | None = None, *, revision: str | None = None
) -> ModelFiles:
    """Find the files of a model, downloading those that are needed and not in the cache.

    Args:
        ref: a model directory or a file in it, a GGUF file, `[hf:]org/name[@revision]`, or None.
        revision: branch, tag or commit on the Hub; instead of `@revision`.

    Raises:
        ModelNotFoundError: nothing is there under this reference, or it cannot be reached.
        UnsupportedModelError: a repository or a file of a format that is not read.
        CheckpointError: the files cannot be written to the cache.
        ConfigError: a revision is given twice, or for something that is not on the Hub.
    """
    if ref is None:
        _refuse_revision(revision, "the embedded demo model")
        return _demo_model()
    text = os.fspath(ref)
    forced = text.startswith("hf:")
    local = None if forced else _existing(text)
    if local is not None:
        _refuse_revision(revision, f"the local path {text!r}")
        return _local_model(local)
    match = _HUB_REFERENCE.fullmatch(text.removeprefix("hf:"))
    if match is None or (not forced and _looks_like_path(text)):
        raise ModelNotFoundError(f"there is no model {text!r:.200}", hint=_suggest(text))
    if revision is not None and match["revision"] is not None:
        raise ConfigError(f"two revisions: {text!r} and {revision!r}", hint="give one of them")
    return _hub_model(match["repo"], revision or match["revision"])


def _existing(text: str) -> Path | None:
    """The local file or directory that `text` names, or None."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except RuntimeError:  # ~user, and there is no such user
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise CheckpointError(f"{text}: {error.strerror}") from error


def _refuse_revision(revision: str | None, what: str) -> None:
    if revision is not None:
        raise ConfigError(f"{what} has no revision {revision!r}", hint="leave the revision out")


def _demo_model() -> ModelFiles:
    path = Path(str(importlib.resources.files("bitllm") / "demo"))
    if not (path / _SINGLE_FILE).is_file():
        raise ModelNotFoundError(
            "this installation has no embedded demo model",
            hint=f"name a model, for example {KNOWN_MODELS[0]}",
        )
    return ModelFiles(path, "demo", "embedded in bitllm", is_demo=True)


def _local_model(path: Path) -> ModelFiles:
    directory = path
    if path.is_file():
        if path.suffix == ".gguf":
            # Not resolved: in a cache of downloads the file may be a link to a nameless one.
            return ModelFiles(path.absolute(), path.stem, str(path.absolute()))
        directory = path.parent
        if path.name not in _MODEL_FILES and path.suffix != ".safetensors":
            raise ModelNotFoundError(
                f"{path} is not a file of a model",
                hint="name the directory with config.json and model.safetensors, or a GGUF file",
            )
    directory = directory.resolve()
    return ModelFiles(directory, directory.name, str(directory))


def _looks_like_path(text: str) -> bool:
    return text.startswith((".", "~", "/")) or text.endswith((".safetensors", ".gguf", ".json"))


def _suggest(text: str) -> str:
    """Say what might have been meant: a neighbour on disk, or a well-known model."""
    near = _near_paths(text) or _near_models(text)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return (
        "give a model directory, or org/name on the Hugging Face Hub, "
        f"for example {KNOWN_MODELS[0]}"
    )


def _near_paths(text: str) -> list[str]:
    try:
        path = Path(text).expanduser()
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, RuntimeError, ValueError):
        return []
    return [
        str(path.parent / name) for name in difflib.get_close_matches(path.name, names, 2, 0.75)
    ]


def _near_models(text: str) -> list[str]:
    wanted = text.removeprefix("hf:").partition("@")[0].lower()
    whole = {name.lower(): name for name in KNOWN_MODELS}
    short = {name.lower().partition("/")[2]: name for name in KNOWN_MODELS}
    found = difflib.get_close_matches(wanted, whole, 2, 0.8)
    found += difflib.get_close_matches(wanted.rpartition("/")[2], short, 2, 0.7)
    return list(dict.fromkeys((whole | short)[name] for name in found))[:2]


def _hub_model(repo: str, revision: str | None) -> ModelFiles:
    first = _download(repo, revision, _SMALL_FILES)
    # The directory is named after the commit: the weights come from the same one.
    commit = first.name
    if not (first / "config.json").is_file():
        raise UnsupportedModelError(
            f"{repo} has no config.json: it is not a transformers model",
            hint="GGUF repositories are not supported yet; use the safetensors version",
        )
    index = first / _INDEX_FILE
    path = _download(repo, commit, _shard_names(index) if index.is_file() else [_SINGLE_FILE])
    if not index.is_file() and not (path / _SINGLE_FILE).is_file():
        raise UnsupportedModelError(
            f"{repo} has no {_SINGLE_FILE}",
            hint="bitllm reads safetensors; look for another revision or a converted repository",
        )
    return ModelFiles(path, repo, f"{repo}@{commit[:12]} from the Hugging Face Hub")


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else []
    return sorted({shard for shard in shards if isinstance(shard, str)})


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files that match `patterns`; return the directory of the revision in the cache."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils.tqdm import tqdm
    except ImportError as error:
        raise ModelNotFoundError(
            f"{repo} is not a local path, and huggingface_hub is not installed",
            hint="pip install huggingface_hub, or name a local directory",
        ) from error

    class TerminalBar(tqdm):
        """A progress bar for people, not for log files."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            hidden = kwargs.get("disable") or not sys.stderr.isatty()
            super().__init__(*args, **{**kwargs, "disable": hidden})  # type: ignore[no-untyped-call]

    def download() -> str:
        return snapshot_download(
            repo, revision=revision, allow_patterns=patterns, tqdm_class=TerminalBar
        )

    return Path(_explained(repo, revision, download))


def _explained(repo: str, revision: str | None, download: Callable[[], Any]) -> Any:
    """Run a download; turn what huggingface_hub raises into errors that say the way out."""
    from huggingface_hub import errors

    try:
        return download()
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: its authors ask for your agreement",
            hint=f"agree on its page, then run `hf auth login` or set HF_TOKEN ({_reason(error)})",
        ) from error
    except errors.RepositoryNotFoundError as error:
        near = [name for name in _near_models(repo) if name != repo]
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ModelNotFoundError(
            f"there is no model {repo} on the Hub, or it is private",
            hint=f"{hint}Private models need `hf auth login` or HF_TOKEN",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} has no revision {revision!r}", hint="leave it out, or look at its branches"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{repo!r} cannot be a name on the Hub", hint=str(error)
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(repo, error) from error
    except OSError as error:
        raise _from_os_error(repo, error) from error
    except Exception as error:
        # Which HTTP client raises depends on the version of huggingface_hub.
        if any(base.__module__.startswith("httpx") for base in type(error).__mro__):
            raise _unreachable(repo, error) from error
        raise


def _unreachable(repo: str, error: Exception) -> BitllmError:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ModelNotFoundError(
            f"{repo} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
            hint="unset HF_HUB_OFFLINE, or name a model that is there",
        )
    return ModelNotFoundError(
        f"{repo} is not in the cache, and the Hub cannot be reached",
        hint=f"check the network, HF_ENDPOINT and proxies ({_reason(error)})",
    )


def _from_os_error(repo: str, error: OSError) -> BitllmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{repo}: no space left on the disk of the cache",
            hint="free some, or set HF_HOME to a directory on another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(
            f"{repo}: the cache cannot be written ({error.filename or error})",
            hint="set HF_HOME to a directory that you may write to",
        )
    return _unreachable(repo, error)


def _reason(error: Exception) -> str:
    """The first line of the deepest cause, for a hint."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]

"""What huggingface_hub raises, turned into errors that say the way out."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote

from bitllm.errors import BitllmError, CheckpointError, ModelNotFoundError
from bitllm.formats.hub.known_models import near_names

__all__ = ["KEPT", "explained", "is_offline", "reason", "unreachable"]

T = TypeVar("T")

KEPT = "what was fetched is kept, and the same command goes on from there"


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids to ask the Hub: the variable now, or when it was imported."""
    from huggingface_hub import constants

    said = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return said or bool(constants.HF_HUB_OFFLINE)


def explained(repo: str, revision: str | None, action: Callable[[], T]) -> T:
    """Run `action`, which asks the Hub for a repository.

    Raises:
        ModelNotFoundError: nothing is there under this name, or it cannot be reached.
        CheckpointError: the cache cannot hold it.
    """
    from huggingface_hub import errors

    try:
        return action()
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: its authors ask for your agreement",
            hint=f"agree on its page, then run `hf auth login` or set HF_TOKEN ({reason(error)})",
        ) from error
    except errors.RepositoryNotFoundError as error:
        near = [name for name in near_names(repo) if name != repo]
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
        raise unreachable(repo, error) from error
    except errors.EntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repo} lacks {_file_of(error)}",
            hint="look at the files on its page; its index may name one that is not there",
        ) from error
    except OSError as error:
        raise _from_os_error(repo, error) from error
    except Exception as error:
        # Which HTTP client raises depends on the version of huggingface_hub.
        if any(base.__module__.startswith("httpx") for base in type(error).__mro__):
            raise unreachable(repo, error) from error
        raise


def unreachable(repo: str, error: Exception) -> BitllmError:
    """Return the error for a model that is not in the cache while the Hub cannot be asked."""
    if is_offline():
        return ModelNotFoundError(
            f"{repo} is not in the cache, or not all of it, and HF_HUB_OFFLINE forbids to fetch it",
            hint="leave --offline out, unset HF_HUB_OFFLINE, or name a model that `bitllm list` "
            "shows",
        )
    return ModelNotFoundError(
        f"{repo} is not in the cache, and the Hub cannot be reached",
        hint=f"check the network, HF_ENDPOINT and proxies ({reason(error)})",
    )


def _from_os_error(repo: str, error: OSError) -> BitllmError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"{repo}: no space left on the disk of the cache",
            hint=f"free some, or set HF_HOME to a directory on another disk; {KEPT}",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CheckpointError(
            f"{repo}: the cache cannot be written ({error.filename or error})",
            hint="set HF_HOME to a directory that you may write to",
        )
    return unreachable(repo, error)


_ADDRESS = re.compile(r"(?:\s+(?:for|at))?(?:\s+url:?)?\s*[\"']?https?://[^\s\"')]+[\"']?")


def reason(error: Exception) -> str:
    """Return the first line of the deepest cause, for a hint, without the addresses in it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    said = _ADDRESS.sub("", str(cause)).strip() or type(cause).__name__
    return said.splitlines()[0][:200].rstrip(" .:")


def _file_of(error: Exception) -> str:
    """Return which file the Hub does not have, by the address that was asked for."""
    asked = re.search(r"https?://[^\s\"']+/resolve/[^/\s]+/([^\s\"'?]+)", str(error))
    return unquote(asked[1]).rstrip(".") if asked else "a file that was to be fetched"

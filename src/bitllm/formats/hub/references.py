"""How people name a model of the Hub: a short name, `org/name`, a GGUF file in it, a revision.

    [hf:]org/name                the repository's safetensors, or its only GGUF file
    [hf:]org/name/file.gguf      a file of the repository
    [hf:]org/name:I2_S           its one GGUF file that has this in its name
    2b, falcon-e-1b, ...         a well-known model (`bitllm.formats.hub.known_models`)

each with `@revision` behind it: a branch, tag or commit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from bitllm.errors import ConfigError
from bitllm.formats.hub.known_models import find_alias

__all__ = ["HubReference", "parse_reference"]

_REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*?)"
    r"(?:/(?P<file>(?:[\w+-][\w.+-]*/)*[\w+-][\w.+-]*\.gguf)|:(?P<kind>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?",
    re.ASCII,
)
_ALIAS = re.compile(r"(?P<alias>[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_LONGEST = 1000


@dataclass(frozen=True, slots=True)
class HubReference:
    """A model of the Hub.

    Attributes:
        repo: `org/name`.
        file: path of a GGUF file in it, or None.
        kind: what the name of the GGUF file has to hold, or None.
        revision: branch, tag or commit, None = the default branch.
    """

    repo: str
    file: str | None = None
    kind: str | None = None
    revision: str | None = None

    def at(self, revision: str | None) -> HubReference:
        """Return the same at a revision, which must not have been named before.

        Raises:
            ConfigError: two revisions.
        """
        if revision is None:
            return self
        if self.revision is not None:
            raise ConfigError(
                f"two revisions of {self.repo}: {self.revision!r} and {revision!r}",
                hint="give one of them",
            )
        return replace(self, revision=revision)


def parse_reference(text: str) -> HubReference | None:
    """Read a reference to the Hub; None if `text` cannot be one."""
    text = text.removeprefix("hf:")
    if len(text) > _LONGEST:
        return None
    if match := _REFERENCE.fullmatch(text):
        return HubReference(**match.groupdict())
    match = _ALIAS.fullmatch(text)
    known = find_alias(match["alias"]) if match else None
    if match is None or known is None:
        return None
    revision = match["revision"] or known.revision
    return HubReference(known.repo, known.file, None, revision)

"""Well-known ternary models: short names for them, and what may be meant by a typing error."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

__all__ = ["KNOWN_MODELS", "KnownModel", "find_alias", "near_names"]


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A published model.

    Attributes:
        alias: the short name, in lower case.
        repo: `org/name` on the Hugging Face Hub.
        what: what it is, in a few words.
        file: the GGUF file that is meant, None = the repository's safetensors.
        revision: the branch that is meant, None = the default one.
    """

    alias: str
    repo: str
    what: str
    file: str | None = None
    revision: str | None = None

    @property
    def reference(self) -> str:
        """The long form: `org/name[/file][@revision]`."""
        file = f"/{self.file}" if self.file else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{file}{revision}"


KNOWN_MODELS = (
    KnownModel("2b", "microsoft/bitnet-b1.58-2B-4T", "BitNet 2B, chat, packed"),
    KnownModel("2b-bf16", "microsoft/bitnet-b1.58-2B-4T-bf16", "BitNet 2B, master weights"),
    KnownModel(
        "2b-gguf",
        "microsoft/bitnet-b1.58-2B-4T-gguf",
        "BitNet 2B, chat, I2_S",
        file="ggml-model-i2_s.gguf",
    ),
    KnownModel("falcon-e-1b", "tiiuae/Falcon-E-1B-Instruct", "Falcon-Edge 1B, chat"),
    KnownModel("falcon-e-3b", "tiiuae/Falcon-E-3B-Instruct", "Falcon-Edge 3B, chat"),
    KnownModel("falcon-e-1b-base", "tiiuae/Falcon-E-1B-Base", "Falcon-Edge 1B, base"),
    KnownModel("falcon-e-3b-base", "tiiuae/Falcon-E-3B-Base", "Falcon-Edge 3B, base"),
    KnownModel("falcon3-1b", "tiiuae/Falcon3-1B-Instruct-1.58bit", "Falcon3 1B, chat"),
    KnownModel("falcon3-3b", "tiiuae/Falcon3-3B-Instruct-1.58bit", "Falcon3 3B, chat"),
    KnownModel("falcon3-7b", "tiiuae/Falcon3-7B-Instruct-1.58bit", "Falcon3 7B, chat"),
    KnownModel("falcon3-10b", "tiiuae/Falcon3-10B-Instruct-1.58bit", "Falcon3 10B, chat"),
    KnownModel("llama3-8b", "HF1BitLLM/Llama3-8B-1.58-100B-tokens", "Llama 3 8B, fine-tuned"),
    KnownModel("1bitllm-large", "1bitLLM/bitnet_b1_58-large", "first reproduction, 0.7B, base"),
    KnownModel("1bitllm-3b", "1bitLLM/bitnet_b1_58-3B", "first reproduction, 3B, base"),
    KnownModel("trilm-99m", "SpectraSuite/TriLM_99M_Unpacked", "TriLM 99M, base"),
    KnownModel("trilm-3.9b", "SpectraSuite/TriLM_3.9B_Unpacked", "TriLM 3.9B, base"),
)
"""Published models in formats that bitllm reads. The names are compared without upper case."""


def find_alias(text: str) -> KnownModel | None:
    """Return the model that `text`, in any case, is the short name of."""
    return next((model for model in KNOWN_MODELS if model.alias == text.lower()), None)


def near_names(text: str) -> list[str]:
    """Return up to two references that `text` may be a typing error of, the likeliest first."""
    wanted = text.lower()
    whole = {model.repo.lower(): model.repo for model in KNOWN_MODELS}
    short = {model.repo.lower().partition("/")[2]: model.repo for model in KNOWN_MODELS}
    aliases = {model.alias: model.alias for model in KNOWN_MODELS}
    found = difflib.get_close_matches(wanted, aliases, 2, 0.75)
    found += difflib.get_close_matches(wanted, whole, 2, 0.8)
    found += difflib.get_close_matches(wanted.rpartition("/")[2], short, 2, 0.7)
    names = aliases | whole | short
    return list(dict.fromkeys(names[name] for name in found))[:2]

"""Recipes: everything that decides a training run, in one typed TOML file.

An unknown key is an error that names the nearest known one; a value of the wrong type or out of
range is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitllm.checkpoint import LayerSpec, LinearSpec, ModelSpec, RopeSpec
from bitllm.errors import ConfigError

__all__ = [
    "ExportSettings",
    "ModelSettings",
    "Recipe",
    "TextSettings",
    "TokenizerSettings",
    "TrainingSettings",
    "load_recipe",
    "recipe_from_dict",
]


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The corpus.

    Attributes:
        source: "python" for the documentation of the running Python, "files" for text files.
        files: paths of UTF-8 text files relative to the recipe, for "files".
        held_out_percent: part of the modules or files that is never trained on.
        sha256: what the corpus must hash to (`documents_sha256`); None takes any text.
        python: the Python release that `sha256` belongs to; only said in messages.
    """

    source: Literal["python", "files"] = "python"
    files: tuple[str, ...] = ()
    held_out_percent: float = 5.0
    sha256: str | None = None
    python: str | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.held_out_percent < 100, "text.held_out_percent must lie in 0 .. 100")
        _require(
            bool(self.files) == (self.source == "files"),
            'text.files goes with text.source = "files", and only there',
        )


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The vocabulary: a byte-level BPE of `vocab_size` entries, learned from the training text."""

    vocab_size: int = 4096


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """The architecture: a Hugging Face `bitnet` model, whose layers are all alike.

    Sub-norms, squared ReLU and the tied head are those of BitNet b1.58 2B4T; transformers loads
    such a model as `BitNetForCausalLM`.
    """

    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn_size: int = 768
    context: int = 512
    activation: Literal["relu2", "silu"] = "relu2"
    tied_head: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "layers", "heads", "kv_heads", "head_dim", "ffn_size", "context")
        for name in sizes:
            _require(getattr(self, name) > 0, f"model.{name} must be positive")

    def to_spec(self, vocab_size: int) -> ModelSpec:
        """Return the architecture for a vocabulary of `vocab_size` ids."""
        hidden, ffn = self.hidden_size, self.ffn_size
        heads, kv_heads = self.heads * self.head_dim, self.kv_heads * self.head_dim
        layer = LayerSpec(
            q=LinearSpec(heads, hidden),
            k=LinearSpec(kv_heads, hidden),
            v=LinearSpec(kv_heads, hidden),
            o=LinearSpec(hidden, heads),
            gate=LinearSpec(ffn, hidden),
            up=LinearSpec(ffn, hidden),
            down=LinearSpec(hidden, ffn),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope=RopeSpec(theta=self.rope_theta, dim=self.head_dim),
            activation=self.activation,
            norm_eps=self.norm_eps,
            query_scale=1.0 / math.sqrt(self.head_dim),
            attn_sub_norm=True,
            ffn_sub_norm=True,
        )
        return ModelSpec(
            architecture="BitNetForCausalLM",
            vocab_size=vocab_size,
            hidden_size=hidden,
            layers=(layer,) * self.layers,
            norm_eps=self.norm_eps,
            tied_head=self.tied_head,
            max_context=self.context,
        )


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The optimisation, in two stages (BitNet training tips, microsoft/unilm, 2024).

    The learning rate rises over `warmup_steps` to `learning_rate`, falls linearly to
    `first_stage_end` at the middle of the run, goes on from `second_stage_start` and falls linearly
    to `final_learning_rate`. Weight decay holds in the first stage only.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: windows in a step.
        sequence_length: predicted tokens in a window.
        learning_rate, first_stage_end, second_stage_start, final_learning_rate: of AdamW.
        warmup_steps: steps until the full learning rate.
        weight_decay: decay of matrices in the first stage.
        betas: of AdamW.
        gradient_clip: largest norm of all gradients together.
        seed: of initial weights and of the order of the data.
        threads: of PyTorch; None leaves its own choice.
        log_every, evaluate_every, checkpoint_every: steps between lines of the log, evaluations on
            held-out text, and checkpoints.
    """

    steps: int
    batch_size: int = 4
    sequence_length: int = 512
    learning_rate: float = 3e-3
    first_stage_end: float = 2e-3
    second_stage_start: float = 2e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    seed: int = 0
    threads: int | None = None
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "sequence_length", "log_every", "evaluate_every")
        for name in (*counts, "checkpoint_every", "learning_rate", "gradient_clip"):
            _require(getattr(self, name) > 0, f"training.{name} must be positive")
        rates = ("first_stage_end", "second_stage_start", "final_learning_rate", "weight_decay")
        for name in rates:
            _require(getattr(self, name) >= 0, f"training.{name} must not be negative")
        _require(self.threads is None or self.threads > 0, "training.threads must be positive")
        in_range = 0 <= self.warmup_steps < self.steps
        _require(in_range, "training.warmup_steps must be below training.steps")
        _require(all(0 <= beta < 1 for beta in self.betas), "training.betas must lie in 0 .. 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, 0 .. steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        middle = self.steps / 2
        if step < middle:
            part = (step - self.warmup_steps) / max(middle - self.warmup_steps, 1)
            return self.learning_rate + part * (self.first_stage_end - self.learning_rate)
        part = (step - middle) / middle
        start = self.second_stage_start
        return start + part * (self.final_learning_rate - start)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of a step: none from the middle of the run on."""
        return self.weight_decay if step < self.steps / 2 else 0.0


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """What the exported folder says beside the weights: defaults of generation."""

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run.

    Attributes:
        name: what the model is called.
        training: the optimisation.
        text: the corpus.
        tokenizer: the vocabulary.
        model: the architecture.
        export: defaults written beside the weights.
        folder: where relative paths start.
        sha256: hash of the recipe file, "" for a recipe made in code.
    """

    name: str
    training: TrainingSettings
    text: TextSettings = field(default_factory=TextSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    export: ExportSettings = field(default_factory=ExportSettings)
    folder: Path = Path()
    sha256: str = ""

    def __post_init__(self) -> None:
        _require(
            self.training.sequence_length <= self.model.context,
            f"training.sequence_length {self.training.sequence_length} is above "
            f"model.context {self.model.context}",
        )

    def spec(self) -> ModelSpec:
        """Return the architecture with the vocabulary of the recipe."""
        return self.model.to_spec(self.tokenizer.vocab_size)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        ConfigError: no such file, no TOML, or a key or value that cannot be meant.
    """
    try:
        data = path.read_bytes()
        values = tomllib.loads(data.decode())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this recipe: {error.strerror}") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: this recipe is not valid TOML: {error}") from error
    try:
        recipe = recipe_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(recipe, folder=path.parent, sha256=digest)


def recipe_from_dict(values: dict[str, Any]) -> Recipe:
    """Build a recipe from the tables of a TOML file.

    Raises:
        ConfigError: a key or value that cannot be meant.
    """
    recipe: Recipe = _build(Recipe, values, "", hidden={"folder", "sha256"})
    return recipe


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _build(kind: Any, values: object, where: str, hidden: set[str] | None = None) -> Any:
    """Build the dataclass `kind` from a TOML table; `where` is the table's name and a dot."""
    table = where.rstrip(".")
    if not isinstance(values, dict):
        raise ConfigError(f"[{table}] must be a table, got {values!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in (hidden or ())}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {where}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"unknown key {where}{key}", hint=hint)
    arguments = {}
    for name, item in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], where + name)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}{name} is missing")
    return kind(**arguments)


def _convert(wanted: Any, value: object, key: str) -> Any:
    """Check a TOML value against an annotation and return it as that type."""
    if dataclasses.is_dataclass(wanted):
        return _build(wanted, value, f"{key}.")
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:  # only "X | None" occurs, and TOML has no null
        return _convert(options[0], value, key)
    if origin is Literal:
        if value not in options:
            known = ", ".join(map(repr, options))
            raise ConfigError(f"{key} must be one of {known}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        if options[-1] is not Ellipsis and len(value) != len(options):
            raise ConfigError(f"{key} must have {len(options)} entries, got {len(value)}")
        return tuple(_convert(options[0], entry, key) for entry in value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{key} must be of type {wanted.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value}")
    return value

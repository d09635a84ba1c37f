"""Recipes: everything that decides a training run, as typed settings that check themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bitllm.checkpoint import LINEAR_NAMES, LayerSpec, LinearSpec, ModelSpec, RopeSpec
from bitllm.errors import ConfigError

__all__ = [
    "AdapterSettings",
    "DistillationSettings",
    "ExportSettings",
    "ModelSettings",
    "QuantizationSettings",
    "Recipe",
    "StartSettings",
    "TextSettings",
    "TokenizerSettings",
    "TrainingSettings",
]


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The corpus.

    Attributes:
        source: "python" for the documentation of the running Python, "files" for text files,
            "chat" for JSONL files of dialogues: a line is {"messages": [{"role", "content"}, ...]},
            and only what the assistant says is learned; "jsonl" and "parquet" for files of records,
            "dataset" for a dataset of Hugging Face.
        files: paths of files relative to the recipe; for "dataset" one name, that of a folder which
            `save_to_disk` wrote or of a dataset on the Hub.
        field: which field of a record is the text.
        split: of the dataset.
        held_out_percent: part of the modules, files or dialogues that is never trained on.
        sha256: what the corpus must hash to (`documents_sha256`); None takes any text.
        python: the Python release that `sha256` belongs to; only said in messages.
    """

    source: Literal["python", "files", "chat", "jsonl", "parquet", "dataset"] = "python"
    files: tuple[str, ...] = ()
    field: str = "text"
    split: str = "train"
    held_out_percent: float = 5.0
    sha256: str | None = None
    python: str | None = None

    def __post_init__(self) -> None:
        single = self.source != "dataset" or len(self.files) == 1
        _require(single, 'text.source = "dataset" takes one name in text.files')
        _require(0 <= self.held_out_percent < 100, "text.held_out_percent must lie in 0 .. 100")
        _require(
            bool(self.files) == (self.source != "python"),
            'text.files goes with every text.source but "python", and there is none without it',
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
class StartSettings:
    """The model that training starts from, instead of random weights.

    Attributes:
        model: a directory with config.json, floating-point weights and tokenizer, relative to the
            recipe; or a model of the Hub.
        sub_norms: put an RMSNorm before the output projections of attention and feed-forward
            network (SubLN), as BitDistill does (Wu et al., 2025); the result is a model of the
            `bitnet` kind.
    """

    model: str
    sub_norms: bool = False


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """What is trained.

    Attributes:
        weight_bits: "1.58" for ternary weights; "1", "2", "4", "8" and "dense" for comparison,
            which are measured but not exported.
        activation_bits: 8, or 0 for activations that are not rounded.
        warmup_steps: steps over which the strength of the rounding rises from 0 to 1.
        warmup_shape: how it rises: "linear", or "sigmoid" (slowly at both ends).
    """

    weight_bits: Literal["1", "1.58", "2", "4", "8", "dense"] = "1.58"
    activation_bits: Literal[0, 8] = 8
    warmup_steps: int = 0
    warmup_shape: Literal["linear", "sigmoid"] = "linear"

    def __post_init__(self) -> None:
        _require(self.warmup_steps >= 0, "quantization.warmup_steps must not be negative")

    def strength_at(self, step: int) -> float:
        """Return the strength of the rounding in a step, 0 to 1."""
        if step >= self.warmup_steps:
            return 1.0
        part = step / self.warmup_steps
        if self.warmup_shape == "linear":
            return part
        # A logistic curve stretched so that it starts at 0 and ends at 1.
        low, high = _logistic(-6.0), _logistic(6.0)
        return (_logistic(12.0 * part - 6.0) - low) / (high - low)


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@dataclass(frozen=True, slots=True)
class DistillationSettings:
    """Learning from a dense teacher beside the text (BitDistill; Wu et al., 2025).

    loss = cross-entropy + logits_weight * KL(teacher || student) + relation_weight * relations.

    Attributes:
        teacher: as `StartSettings.model`; it has to have the vocabulary of the student.
        temperature: both logits are divided by it.
        logits_weight: of the divergence of the next-token distributions.
        relation_weight: of the divergence of the attention relations (MiniLM; Wang et al., 2021):
            how alike the queries, keys and values of two positions are.
        relation_layer: of teacher and student; negative ones count from the end.
        relation_heads: heads into which queries, keys and values are cut for it.
    """

    teacher: str
    temperature: float = 5.0
    logits_weight: float = 1.0
    relation_weight: float = 1.0
    relation_layer: int = -2
    relation_heads: int = 4

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "distillation.temperature must be positive")
        _require(self.relation_heads > 0, "distillation.relation_heads must be positive")
        for name in ("logits_weight", "relation_weight"):
            _require(getattr(self, name) >= 0, f"distillation.{name} must not be negative")


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Low-rank adapters on a frozen ternary model (LoRA; Hu et al., 2021).

    y = ternary(x) + alpha / rank * B (A x)

    Attributes:
        rank: rows of A and columns of B.
        alpha: strength of the adapter.
        targets: projections that get one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...] = LINEAR_NAMES  # type: ignore[assignment]

    def __post_init__(self) -> None:
        _require(self.rank > 0, "adapter.rank must be positive")
        _require(self.alpha > 0, "adapter.alpha must be positive")
        _require(bool(self.targets), "adapter.targets names no projection")


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The optimisation.

    The schedule "two_stage" is that of the BitNet training tips (microsoft/unilm, 2024): the
    learning rate rises over `warmup_steps` to `learning_rate`, falls linearly to `first_stage_end`
    at the middle of the run, goes on from `second_stage_start` and falls linearly to
    `final_learning_rate`. Weight decay holds in the first stage only. "cosine" falls from
    `learning_rate` to `final_learning_rate` in half a cosine, "constant" stays; both with weight
    decay all the way.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: windows computed at once.
        accumulation: such batches in a step; their gradients are added up.
        sequence_length: predicted tokens in a window.
        schedule: of the learning rate.
        learning_rate, first_stage_end, second_stage_start, final_learning_rate: of the optimizer.
        warmup_steps: steps until the full learning rate.
        weight_decay: decay of matrices.
        optimizer: "adamw" for everything; or "muon" (Jordan et al., 2024) for the matrices of the
            layers and AdamW for the rest.
        muon_learning_rate: peak for the matrices with "muon"; it falls as `learning_rate` does.
        betas: of AdamW.
        gradient_clip: largest norm of all gradients together.
        precision: "fp32", or "bf16" for products in bfloat16 (autocast) with float32 weights.
        document_mask: tokens attend to those of their own document only.
        ema: decay of an average of the weights, which is evaluated and exported; 0 for none.
        on_anomaly: what to do when the loss is no number or jumps: "stop", or "roll_back" to the
            last checkpoint and go on with other text, three times at most.
        spike_factor: a loss so many times the median of the last 50 steps is a jump.
        seed: of initial weights and of the order of the data.
        threads: of PyTorch; None leaves its own choice.
        device: "cpu", or "cuda" for a GPU; ranks of one machine take one each.
        log_every, evaluate_every, checkpoint_every: steps between lines of the log, evaluations on
            held-out text, and checkpoints.
        tensorboard: write the figures for TensorBoard too.
        picture: draw the curves at every evaluation.
    """

    steps: int
    batch_size: int = 4
    accumulation: int = 1
    sequence_length: int = 512
    schedule: Literal["two_stage", "cosine", "constant"] = "two_stage"
    learning_rate: float = 3e-3
    first_stage_end: float = 2e-3
    second_stage_start: float = 2e-3
    final_learning_rate: float = 0.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    gradient_clip: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    document_mask: bool = False
    ema: float = 0.0
    on_anomaly: Literal["stop", "roll_back"] = "stop"
    spike_factor: float = 10.0
    seed: int = 0
    threads: int | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    log_every: int = 10
    evaluate_every: int = 200
    checkpoint_every: int = 100
    tensorboard: bool = False
    picture: bool = False

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulation", "sequence_length", "log_every")
        positive = ("evaluate_every", "checkpoint_every", "learning_rate", "muon_learning_rate")
        for name in (*counts, *positive, "gradient_clip"):
            _require(getattr(self, name) > 0, f"training.{name} must be positive")
        rates = ("first_stage_end", "second_stage_start", "final_learning_rate", "weight_decay")
        for name in rates:
            _require(getattr(self, name) >= 0, f"training.{name} must not be negative")
        _require(self.threads is None or self.threads > 0, "training.threads must be positive")
        in_range = 0 <= self.warmup_steps < self.steps
        _require(in_range, "training.warmup_steps must be below training.steps")
        _require(all(0 <= beta < 1 for beta in self.betas), "training.betas must lie in 0 .. 1")
        _require(0 <= self.ema < 1, "training.ema must lie in 0 .. 1")
        _require(self.spike_factor > 1, "training.spike_factor must be above 1")

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, 0 .. steps - 1."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "cosine":
            part = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
            span = self.learning_rate - self.final_learning_rate
            return self.final_learning_rate + span * (1 + math.cos(math.pi * part)) / 2
        middle = self.steps / 2
        if step < middle:
            part = (step - self.warmup_steps) / max(middle - self.warmup_steps, 1)
            return self.learning_rate + part * (self.first_stage_end - self.learning_rate)
        part = (step - middle) / middle
        start = self.second_stage_start
        return start + part * (self.final_learning_rate - start)

    def weight_decay_at(self, step: int) -> float:
        """Return the weight decay of a step: with two stages none from the middle of the run on."""
        ends = self.schedule == "two_stage" and step >= self.steps / 2
        return 0.0 if ends else self.weight_decay


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
        tokenizer: the vocabulary, for a run that starts from random weights.
        model: the architecture, for such a run.
        start: the model that the run starts from; its vocabulary and architecture are kept.
        quantization: what is trained.
        distillation: the teacher, if there is one.
        adapter: train adapters on the frozen model instead of its weights.
        export: defaults written beside the weights.
        folder: where relative paths start.
        sha256: hash of the recipe file, "" for a recipe made in code.
    """

    name: str
    training: TrainingSettings
    text: TextSettings = field(default_factory=TextSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    start: StartSettings | None = None
    quantization: QuantizationSettings = field(default_factory=QuantizationSettings)
    distillation: DistillationSettings | None = None
    adapter: AdapterSettings | None = None
    export: ExportSettings = field(default_factory=ExportSettings)
    folder: Path = Path()
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.start is None:
            self._check_from_random()
        else:
            made = self.tokenizer == TokenizerSettings() and self.model == ModelSettings()
            _require(made, "[start] names a model: [tokenizer] and [model] are those of that model")
        if self.adapter is not None:
            self._check_adapter()

    def _check_from_random(self) -> None:
        _require(
            self.training.sequence_length <= self.model.context,
            f"training.sequence_length {self.training.sequence_length} is above "
            f"model.context {self.model.context}",
        )
        _require(self.text.source != "chat", 'text.source = "chat" needs a model in [start]')

    def _check_adapter(self) -> None:
        _require(self.start is not None, "[adapter] needs a ternary model in [start]")
        _require(self.distillation is None, "[adapter] and [distillation] do not go together")
        plain = self.quantization == QuantizationSettings()
        _require(plain, "[adapter] leaves the model as it is: no [quantization] beside it")
        sub_norms = self.start is not None and self.start.sub_norms
        _require(not sub_norms, "[adapter] leaves the model as it is: no start.sub_norms")
        _require(self.training.optimizer == "adamw", 'adapters are trained with "adamw"')

    def spec(self) -> ModelSpec:
        """Return the architecture of a run from random weights, with the recipe's vocabulary."""
        return self.model.to_spec(self.tokenizer.vocab_size)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)

"""Against transformers: models with random weights, written by its own save_pretrained.

Integers (codes, int8 activations, accumulators) are compared with `==` on identical inputs. Whole
models run in float32 on both sides. Mostly their logits then differ by a normalised squared error
of about 1e-13; but once a difference in the last bit moves an int8 code to the other side of a tie,
everything behind it in that text moves by the noise of the quantisation itself. Which codes flip
may change with the alignment of memory, on which torch's sums depend. So of five texts the median
error is held to 1e-4, the largest to 1e-3, and greedy tokens are the same except where
transformers' own two best are closer than 0.05 (in a text with a flipped code: than four times the
row's difference); those are counted and listed. Each layer on its own, fed with the input that it
had in transformers, is held to 1e-6 at a quarter of its tokens at least.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import BitNetQuantConfig

from batches import logits_of
from bitllm.backends import get_backend
from bitllm.backends.base import LoadOptions
from bitllm.checkpoint import LINEAR_NAMES, Checkpoint, RopeSpec
from bitllm.formats import open_checkpoint
from bitllm.ternary import matmul_int32, quantize_activations
from bitllm.tokenizer import StreamDetokenizer, load_tokenizer
from layer_by_layer import layer_errors, layers_in_transformers

# Run what transformers compiles as it is written: nothing is gained at these sizes.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet as hf

VOCAB = 131
MODULES = {name: f"self_attn.{name}_proj" for name in "qkvo"}
MODULES |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 132,
    "intermediate_size": 204,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Case:
    """An architecture of transformers, its quantisation, and how its weights are written.

    `published` names a family whose files say the same by other names and keys.
    """

    architecture: str
    linear_class: str
    mode: str
    config: dict[str, Any] = field(default_factory=dict)
    use_rms_norm: bool = False
    dtype: torch.dtype = torch.float32
    stored: str = "as transformers holds them"
    published: str = "by transformers"


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
TIED = {"tie_word_embeddings": True}
GEMMA = {
    **TIED,
    "head_dim": 24,
    "query_pre_attn_scalar": 20,
    "sliding_window": 9,
    "layer_types": ["sliding_attention", "full_attention"],
}

CASES = {
    "bitnet online": Case("BitNet", "autobitlinear", "online", TIED),
    "bitnet online bf16": Case("BitNet", "autobitlinear", "online", TIED, dtype=torch.bfloat16),
    "bitnet online fp16 untied": Case("BitNet", "autobitlinear", "online", dtype=torch.float16),
    "bitnet offline packed": Case("BitNet", "autobitlinear", "offline", TIED, stored="packed"),
    "bitnet offline packed bf16": Case(
        "BitNet", "autobitlinear", "offline", dtype=torch.bfloat16, stored="packed"
    ),
    "bitnet offline unpacked": Case("BitNet", "autobitlinear", "offline"),
    "bitnet offline one unpacked": Case(
        "BitNet", "autobitlinear", "offline", {"attention_bias": True}, stored="packed but one"
    ),
    "bitnet bitlinear": Case("BitNet", "bitlinear", "offline", TIED),
    "llama bitlinear": Case("Llama", "bitlinear", "offline"),
    "llama bitlinear bf16": Case("Llama", "bitlinear", "offline", dtype=torch.bfloat16),
    "llama bitlinear rms_norm": Case("Llama", "bitlinear", "offline", use_rms_norm=True),
    "llama online rms_norm": Case("Llama", "autobitlinear", "online", TIED, use_rms_norm=True),
    "llama packed": Case("Llama", "autobitlinear", "offline", stored="packed"),
    "llama head_dim": Case("Llama", "bitlinear", "offline", {"head_dim": 24}),
    "llama biases": Case(
        "Llama", "bitlinear", "offline", {"attention_bias": True, "mlp_bias": True}
    ),
    "llama llama3 rope": Case("Llama", "autobitlinear", "online", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": Case("Llama", "bitlinear", "offline", {"rope_parameters": LINEAR_ROPE}),
    "qwen3": Case("Qwen3", "bitlinear", "offline", {**TIED, "head_dim": 20}, use_rms_norm=True),
    "qwen2": Case("Qwen2", "autobitlinear", "online"),
    "mistral": Case("Mistral", "bitlinear", "offline", {"sliding_window": 9, "head_dim": 16}),
    "gemma3": Case("Gemma3", "bitlinear", "offline", GEMMA),
    "gemma3 embedding": Case(
        "Gemma3", "autobitlinear", "online", GEMMA, use_rms_norm=True, published="embedding"
    ),
    "qwen3 embedding": Case(
        "Qwen3",
        "autobitlinear",
        "online",
        {**TIED, "head_dim": 20, "rms_norm_eps": 1e-5},
        use_rms_norm=True,
        published="embedding",
    ),
    "1bitllm": Case(
        "BitNet",
        "autobitlinear",
        "online",
        {**TIED, "hidden_act": "silu", "rope_parameters": {"rope_theta": 1e4}},
        published="1bitLLM",
    ),
}


@dataclass(frozen=True)
class Written:
    """A model of transformers, in float32, and the checkpoint read from what it wrote."""

    model: Any
    checkpoint: Checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Models this small gain nothing by more threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    case = CASES[request.param]
    directory = tmp_path_factory.mktemp("model")
    model = make_model(case)
    state = {name: stored_tensor(case, name, t) for name, t in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    assert (directory / "model.safetensors").is_file()
    if case.published != "by transformers":
        publish(directory, case.published)
    model = model.float()
    for module in model.modules():
        if isinstance(module, hf.BitLinear):
            module.dtype = torch.float32
    return Written(model, open_checkpoint(directory))


def make_model(case: Case) -> Any:
    """A model with random weights whose seven projections are transformers' bitnet modules."""
    torch.manual_seed(len(str(case)))
    text = "Text" if case.architecture == "Gemma3" else ""
    config_class = getattr(transformers, f"{case.architecture}{text}Config")
    model_class = getattr(transformers, f"{case.architecture}ForCausalLM")
    quantization = BitNetQuantConfig(
        linear_class=case.linear_class,
        quantization_mode=case.mode,
        use_rms_norm=case.use_rms_norm,
        rms_norm_eps=case.config.get("rms_norm_eps", 1e-6),
    )
    model = model_class(config_class(**{**SIZES, **case.config}))
    tables = dict(model.model.rotary_emb.named_buffers())
    model = model.to(case.dtype)
    for name, frequencies in tables.items():  # float32 also in models of less precision
        setattr(model.model.rotary_emb, name, frequencies)
    model = hf.replace_with_bitnet_linear(model, ["lm_head"], quantization)
    model.config.quantization_config = quantization
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, hf.BitLinear | hf.AutoBitLinear):
                module.to_empty(device="cpu")
                fill_projection(module)
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "proj" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


def fill_projection(module: Any) -> None:
    """Give a projection random weights in the form that its class keeps, of a size near 1."""
    size = module.in_features**-0.5 * (0.5 + torch.rand(()))
    codes = torch.randint(-1, 2, (module.out_features, module.in_features)).float()
    if isinstance(module, hf.BitLinear):
        module.weight.copy_(hf.pack_weights(codes))
        module.weight_scale.fill_(1 / size)
        if module.bias is not None:
            module.bias.normal_(std=0.3)
    elif module.online_quant:
        module.weight.normal_(std=float(size))
    else:
        module.weight.copy_(codes)
        module.weight_scale.fill_(size)


def stored_tensor(case: Case, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as it goes into the file: the codes of AutoBitLinear may be packed there."""
    packed = case.stored.startswith("packed") and name.endswith("proj.weight")
    if not packed or (case.stored == "packed but one" and "layers.1.mlp.up" in name):
        return tensor
    return hf.pack_weights(tensor.clone())


def publish(directory: Path, family: str) -> None:
    """Rewrite the files as the authors of a family of models write theirs."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    if family == "1bitLLM":
        config |= {"architectures": ["BitnetForCausalLM"], "model_type": "llama"}
        config |= {"weight_bits": 1, "input_bits": 8}
        renamed = {"attn_sub_norm": "inner_attn_ln", "ffn_sub_norm": "ffn_layernorm"}
    else:
        config["architectures"] = [
            {"qwen3": "Qwen3Model", "gemma3_text": "Gemma3TextModel"}[config["model_type"]]
        ]
        renamed = {"rms_norm.weight": "norm.weight", "model.": ""}
    for old, new in renamed.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


def linears(written: Written) -> list[tuple[str, Any]]:
    """Canonical name and transformers module of every projection."""
    return [
        (f"layers.{index}.{name}", layer.get_submodule(MODULES[name]))
        for index, layer in enumerate(written.model.model.layers)
        for name in LINEAR_NAMES
    ]


def codes_of(module: Any) -> np.ndarray:
    """The ternary codes that a projection of transformers computes with, int8 [out, in]."""
    if isinstance(module, hf.BitLinear):
        return hf.unpack_weights(module.weight, torch.int8).numpy()
    if module.online_quant:
        return torch.sign(hf.WeightQuant.apply(module.weight)).to(torch.int8).numpy()
    return module.weight.to(torch.int8).numpy()


def int8_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations rounded to int8 and their factors, by the published formula."""
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5)
    a = torch.full_like(largest, 127.0) / largest
    return (x * a).round().clamp(-128, 127), a


def prompts() -> torch.Tensor:
    """Five texts, each longer than a KV block, int64 [5, tokens]."""
    return torch.randint(0, VOCAB, (5, 34), generator=torch.Generator().manual_seed(5))


class TestProjections:
    def test_codes_are_equal(self, written: Written) -> None:
        for name, module in linears(written):
            assert (written.checkpoint.ternary(name).codes() == codes_of(module)).all(), name

    def test_scales(self, written: Written) -> None:
        """Stored scales are equal to the bit; a mean may round differently in float32."""
        for name, module in linears(written):
            matrix = written.checkpoint.ternary(name)
            if getattr(module, "online_quant", False):
                mean = hf.WeightQuant.apply(module.weight).abs().max().item()
                assert matrix.scales == pytest.approx(mean, rel=1e-6), name
                continue
            stored = matrix.source_scales
            assert stored is not None
            assert stored.to_float32() == np.float32(module.weight_scale.item()), name
            divides = isinstance(module, hf.BitLinear)
            assert matrix.source_convention == ("divide" if divides else "multiply")
            value = np.float32(module.weight_scale.item())
            assert matrix.scales == (np.float32(1) / value if divides else value), name

    def test_accumulators_are_equal(self, written: Written) -> None:
        """What went into each projection of transformers, through our integers and its own."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = [
            module.register_forward_hook(
                lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
            )
            for name, module in linears(written)
        ]
        with torch.no_grad():
            written.model(prompts())
        for hook in hooks:
            hook.remove()
        for name, module in linears(written):
            x, output = (tensor.detach().flatten(0, 1) for tensor in seen[name])
            if module.rms_norm is not None:
                x = module.rms_norm(x).detach()
            q, a = quantize_activations(x.numpy())
            theirs, theirs_a = int8_of(x)
            assert (a == theirs_a.numpy()[:, 0]).all(), name
            assert (q == theirs.numpy()).all(), name
            # Run eagerly, torch takes 127 / x as 127 * (1 / x), which may round to the neighbour.
            # One such code among thousands is within the error below.
            eager = (hf.ActQuant.apply(x) * theirs_a).round().numpy()
            assert abs(eager - q).max() <= 1, name
            assert (eager != q).mean() <= 1e-3, name
            matrix = written.checkpoint.ternary(name)
            accumulators = matmul_int32(matrix.codes(), q)
            expected = theirs.numpy().astype(np.int64) @ codes_of(module).T.astype(np.int64)
            assert (accumulators == expected).all(), name
            ours = accumulators / a[:, None] * matrix.scales
            bias = written.checkpoint.source.dense(f"{name}.bias")
            if bias is not None:
                ours = ours + bias.to_float32()
            assert nmse(ours, output.numpy()) < (1e-11 if (eager == q).all() else 1e-5), name


class TestArchitecture:
    def test_rope_frequencies(self, written: Written) -> None:
        for layer in written.checkpoint.spec.layers:
            ours = layer.rope.inverse_frequencies()
            kind = "sliding" if layer.sliding_window else "full"
            tables = dict(written.model.model.rotary_emb.named_buffers())
            by_kind = tables.get(f"{kind}_attention_inv_freq")
            theirs = (tables["inv_freq"] if by_kind is None else by_kind).numpy()
            # Powers of theta are rounded differently: float32 there, float64 here.
            assert np.allclose(ours, theirs, rtol=5e-7, atol=0)

    def test_spec_agrees_with_the_configuration(self, written: Written) -> None:
        spec, config = written.checkpoint.spec, written.model.config
        layer = spec.layers[0]
        assert spec.vocab_size == config.vocab_size
        assert spec.tied_head == config.tie_word_embeddings
        assert spec.norm_eps == layer.norm_eps == config.rms_norm_eps
        assert (layer.num_heads, layer.num_kv_heads) == (6, 2)
        assert layer.head_dim == written.model.model.layers[0].self_attn.head_dim
        assert spec.max_context == config.max_position_embeddings
        assert isinstance(layer.rope, RopeSpec)
        shapes = [(linear.out_features, linear.in_features) for _, linear in spec.linear_names()]
        assert shapes == [(m.out_features, m.in_features) for _, m in linears(written)]


def nmse(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Squared error over squared size."""
    difference = ours.astype(np.float64) - theirs
    return float((difference**2).sum() / (theirs.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_each_layer_on_the_same_input(written: Written, device: str) -> None:
    """A flipped int8 code reaches later tokens through attention; a wrong layer would reach all."""
    seen = [layers_in_transformers(written.model, text[None]) for text in prompts()]
    for index in range(len(written.checkpoint.spec.layers)):
        errors = np.concatenate(
            [layer_errors(device, written.checkpoint, index, *text[index]) for text in seen]
        )
        assert np.quantile(errors, 0.25) <= 1e-6, index
        assert errors.max() <= 0.1, index


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_logits_of_the_whole_model(written: Written, device: str) -> None:
    ids = prompts()
    with torch.no_grad():
        theirs = written.model(ids).logits.numpy()
    options = LoadOptions(kv_tokens=128, kv_dtype="fp32", threads=1)
    decoder = get_backend(device).load(written.checkpoint, options)
    try:
        ours = np.stack([logits_of(decoder, text.tolist()) for text in ids])
    finally:
        decoder.close()
    errors = np.array([nmse(*texts) for texts in zip(ours, theirs, strict=True)])
    best = np.sort(theirs, axis=-1)
    noise = np.sqrt(((ours - theirs) ** 2).mean(axis=-1))
    margin = np.where(errors[:, None] <= 1e-10, 0.05, np.maximum(0.05, 4 * noise))
    near = best[..., -1] - best[..., -2] < margin
    differ = ours.argmax(-1) != theirs.argmax(-1)
    print(
        f"NMSE of the texts {', '.join(f'{error:.1e}' for error in errors)}; "
        f"greedy differs at {int(differ.sum())} of {differ.size} tokens, "
        f"{int((differ & near).sum())} of them near ties: {np.argwhere(differ).tolist()}"
    )
    assert np.median(errors) <= 1e-4
    assert errors.max() <= 1e-3
    assert not (differ & ~near).any()


CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "naïve café, Größe, Ελληνικά, кириллица, 日本語のテキスト, 中文字符",
    "😀 👩‍👩‍👧‍👦 🇩🇪 ✈️ e\u0301 \u202e\u0000\t\r\n   spaces   ",
    "def f(x):\n    return x ** 2  # 1234567890",
]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer trained here and written by transformers' fast tokenizer class."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    directory = tmp_path_factory.mktemp("tokenizer")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = (
        "{% for message in messages %}\n"
        "    {%- if message.role == 'system' %}{{ message | tojson }}{% endif %}\n"
        "{{ message.role | capitalize ~ ': ' ~ message.content | trim }}<|eot_id|>\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
    fast.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("text", [*CORPUS, "", " ", "<s>a</s><|eot_id|>b", "\ud7ff\U0010ffff"])
def test_tokenizer_parity(tokenizer_directory: Path, text: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    ours = load_tokenizer(tokenizer_directory)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.encode(text, add_bos=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
    stream = StreamDetokenizer(ours)
    assert "".join([stream.push(id) for id in ids] + [stream.flush()]) == ours.decode(ids)


def test_chat_template_parity(tokenizer_directory: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_directory)
    ours = load_tokenizer(tokenizer_directory)
    messages = [
        {"role": "system", "content": "<be> 'kind' & é"},
        {"role": "user", "content": "  hi 😀\n"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "again"},
    ]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(messages) == text
    # The published way of the 2B model: write the template's text, then tokenise it as any text.
    assert ours.encode_chat(messages) == theirs(text)["input_ids"]
    assert theirs.convert_tokens_to_ids("<|eot_id|>") in ours.stop_ids
    assert theirs.eos_token_id in ours.stop_ids

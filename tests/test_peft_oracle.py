"""Adapters against PEFT itself: trained nowhere, but wrapped, saved and run by it.

PEFT gives lora_A the input of the whole module: before a norm of its own and before it is rounded
to int8. Both sides run in float32. Differences in the last bit may move an int8 code to the other
side of a tie, and everything behind it in that text (see test_transformers_oracle.py), so texts are
short and the median of seven is held to 1e-9, where rounding the input of lora_A, or taking it
behind the module's own norm, gives 1e-5 and more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from batches import logits_of
from bitllm.adapter import Adapter, LowRankUpdate
from bitllm.backends import get_backend
from bitllm.backends.base import Decoder, LoadOptions
from bitllm.backends.reference import layer as reference_layer
from bitllm.checkpoint import DenseTensor
from bitllm.formats import open_adapter, open_checkpoint
from bitllm.ternary import quantize_activations
from test_transformers_oracle import TIED, VOCAB, Case, make_model, stored_tensor

# PEFT asks transformers by a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

CASES = {
    "bitnet": Case("BitNet", "autobitlinear", "online", TIED),
    "packed": Case("BitNet", "autobitlinear", "offline", TIED, stored="packed"),
    "own norms": Case("Llama", "autobitlinear", "online", TIED, use_rms_norm=True),
    "biases": Case("Llama", "autobitlinear", "offline", {"attention_bias": True, "mlp_bias": True}),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all-linear", "r": 8, "lora_alpha": 12},
    "attention, rank-stabilised": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "r": 5,
        "lora_alpha": 3.5,
        "use_rslora": True,
    },
    "patterns": {
        "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "r": 4,
        "lora_alpha": 4,
        "rank_pattern": {"model.layers.1.mlp.down_proj": 17, "up_proj": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 9, "down_proj": 2},
        "layers_to_transform": [0, 1],
    },
    "one layer": {
        "target_modules": ["down_proj", "v_proj"],
        "r": 2,
        "lora_alpha": 8,
        "layers_to_transform": [1],
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_pair(case: Case, adapter: dict[str, Any], directory: Path, dtype: torch.dtype) -> Any:
    """A model of transformers with a random adapter; both are saved below `directory`."""
    model = make_model(case)
    state = {name: stored_tensor(case, name, t) for name, t in model.state_dict().items()}
    model.save_pretrained(directory / "model", state_dict=state)
    config = LoraConfig(**adapter, task_type="CAUSAL_LM", lora_dropout=0.3)
    wrapped = get_peft_model(model.float(), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                values = torch.randn(parameter.shape) / parameter.shape[1] ** 0.5
                parameter.copy_(values.to(dtype).float())
    saved = {name: t.to(dtype) for name, t in wrapped.state_dict().items() if "lora_" in name}
    wrapped.save_pretrained(directory / "adapter", state_dict=saved)
    return wrapped


def texts() -> torch.Tensor:
    return torch.randint(0, VOCAB, (7, 5), generator=torch.Generator().manual_seed(5))


def errors(decoder: Decoder, slot: int, expected: np.ndarray) -> list[float]:
    """Normalised squared error of each text."""
    found = []
    for ids, theirs in zip(texts().tolist(), expected, strict=True):
        ours = logits_of(decoder, ids, adapter=slot)
        found.append(float(((ours - theirs) ** 2).sum() / (theirs**2).sum()))
    return sorted(found)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case, adapter, tmp_path):
    dtype = torch.bfloat16 if case == "packed" else torch.float32
    wrapped = write_pair(CASES[case], ADAPTERS[adapter], tmp_path, dtype)
    with torch.no_grad():
        expected = wrapped(texts()).logits.numpy()
        with wrapped.disable_adapter():
            plain = wrapped(texts()).logits.numpy()
    loaded = open_adapter(tmp_path / "adapter")
    names = {torch.float32: "f32", torch.bfloat16: "bf16"}
    assert {update.a.dtype for update in loaded.updates.values()} == {names[dtype]}
    options = LoadOptions(kv_dtype="fp32", threads=1)
    decoder = get_backend("cpu").load(open_checkpoint(tmp_path / "model"), options)
    slot = decoder.load_adapter(loaded)
    found = errors(decoder, slot, expected)
    assert found[3] < 1e-9, found
    assert errors(decoder, -1, plain)[3] < 1e-9
    assert errors(decoder, -1, expected)[0] > 1e-4  # the adapter does change the text


@pytest.mark.parametrize("mistake", ["rounded input", "input behind the norm", "half the scale"])
def test_the_bound_tells_mistakes(mistake, tmp_path, monkeypatch):
    """What the comparison above is worth: each of these is far outside of its bound."""
    wrapped = write_pair(CASES["own norms"], ADAPTERS["all"], tmp_path, torch.float32)
    with torch.no_grad():
        expected = wrapped(texts()).logits.numpy()
    low_rank = reference_layer.low_rank

    def rounded(x: np.ndarray, update: Any) -> np.ndarray:
        codes, a = quantize_activations(x)
        return low_rank(codes.astype(np.float32) / a[:, None], update)

    def normed(x: np.ndarray, update: Any) -> np.ndarray:
        return low_rank(reference_layer.rms_norm(x, np.ones(x.shape[1], np.float32), 1e-6), update)

    def halved(x: np.ndarray, update: Any) -> np.ndarray:
        return low_rank(x, update) * np.float32(0.5)

    mistakes = {
        "rounded input": rounded,
        "input behind the norm": normed,
        "half the scale": halved,
    }
    options = LoadOptions(kv_dtype="fp32")
    decoder = get_backend("reference").load(open_checkpoint(tmp_path / "model"), options)
    slot = decoder.load_adapter(open_adapter(tmp_path / "adapter"))
    assert errors(decoder, slot, expected)[3] < 1e-9
    monkeypatch.setattr(reference_layer, "low_rank", mistakes[mistake])
    assert errors(decoder, slot, expected)[3] > 1e-6


def test_a_product_with_floats_is_that_of_merged_weights() -> None:
    """Against W + scale * B A in torch, float64; the difference is that of float32 sums."""
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (70, 300)).double()
    a, b, x = torch.randn(16, 300), torch.randn(70, 16), torch.randn(9, 300)
    update = next(iter(_one_update(a, b).updates.values()))
    merged = codes * 0.02 + 0.5 * (b.double() @ a.double())
    exact = (x.double() @ merged.T).numpy()
    ours = (x.double() @ (codes * 0.02).T).numpy() + reference_layer.low_rank(x.numpy(), update)
    theirs = (x @ merged.float().T).numpy()
    noise = np.abs(theirs - exact).max()
    assert np.abs(ours - exact).max() < 4 * noise
    assert noise < 1e-3


def _one_update(a: torch.Tensor, b: torch.Tensor) -> Adapter:
    tensors = (DenseTensor(each.numpy(), "f32") for each in (a, b))
    return Adapter("merged", {"layers.0.q": LowRankUpdate(*tensors, 0.5)})

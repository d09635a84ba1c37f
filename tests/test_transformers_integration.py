"""Models of transformers on our CPU kernels: equal in integers, as near as bf16 elsewhere."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import sys
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import BitNetQuantConfig

from bitllm import (
    BackendUnavailableError,
    ConfigError,
    NotTernaryError,
    QuantizationError,
    UnsupportedModelError,
)
from bitllm.integrations import transformers as integration
from bitllm.integrations.transformers import use_cpu_kernels
from bitllm.ternary import matmul_int32, quantize_activations, quantize_weights

# Run what transformers compiles as it is written: nothing is gained at these sizes.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(torch, "compile", lambda function: function)
    from transformers.integrations import bitnet as hf

VOCAB = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 132,
    "intermediate_size": 204,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
KINDS: dict[str, dict[str, Any]] = {
    "bitnet online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "bitnet offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitnet packed": {"linear_class": "bitlinear", "quantization_mode": "offline"},
    "llama packed": {"linear_class": "bitlinear", "quantization_mode": "offline", "bias": True},
    "llama online norms": {
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
        "use_rms_norm": True,
        "bias": True,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    """A model of random weights whose projections are transformers' bitnet modules."""
    torch.manual_seed(3)
    architecture = "BitNet" if kind.startswith("bitnet") else "Llama"
    options = dict(KINDS[kind])
    biases = {"attention_bias": True, "mlp_bias": True} if options.pop("bias", False) else {}
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **sizes, **biases})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype)
    model = hf.replace_with_bitnet_linear(model, ["lm_head"], BitNetQuantConfig(**options))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, hf.BitLinear | hf.AutoBitLinear):
                module.to_empty(device="cpu")
                if module.rms_norm is not None:
                    module.rms_norm.to(dtype)
                fill(module)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "proj" not in name:
                parameter.normal_(std=0.15)
    return model.eval()


def fill(module: Any) -> None:
    size = module.in_features**-0.5 * (0.5 + torch.rand(()))
    codes = torch.randint(-1, 2, (module.out_features, module.in_features)).float()
    if isinstance(module, hf.BitLinear):
        module.weight.copy_(hf.pack_weights(codes))
        module.weight_scale.fill_(1 / size)
    elif module.online_quant:
        module.weight.normal_(std=float(size))
    else:
        module.weight.copy_(codes)
        module.weight_scale.fill_(size)
    if module.bias is not None:
        module.bias.normal_(std=0.3)


def linears(model: Any) -> list[tuple[str, Any]]:
    kinds = (hf.BitLinear, hf.AutoBitLinear)
    return [(name, each) for name, each in model.named_modules() if isinstance(each, kinds)]


def codes_and_scale(module: Any) -> tuple[np.ndarray, np.float32]:
    """What a projection of transformers computes with, by its own functions."""
    if isinstance(module, hf.BitLinear):
        codes = hf.unpack_weights(module.weight, torch.int8).numpy()
        return codes, np.float32(1) / module.weight_scale.float().numpy()[0]
    if module.online_quant:
        values = hf.WeightQuant.apply(module.weight).detach().float()
        _, scale = quantize_weights(module.weight.detach().float().numpy())
        rounded = torch.from_numpy(scale).to(module.weight.dtype).float().numpy()
        # Their mean may round to the neighbour.
        assert rounded == pytest.approx(values.abs().max().item(), rel=3e-7)
        return torch.sign(values).to(torch.int8).numpy(), rounded
    return module.weight.to(torch.int8).detach().numpy(), module.weight_scale.float().numpy()[0]


def ids_of(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def nmse(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.double(), theirs.double()
    return float(((ours - theirs) ** 2).sum() / (theirs**2).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
class TestProjections:
    def test_they_are_the_exact_integer_product(self, kind: str, dtype: str) -> None:
        model = make_model(kind, DTYPES[dtype])
        theirs = {name: codes_and_scale(module) for name, module in linears(model)}
        use_cpu_kernels(model)
        generator = torch.Generator().manual_seed(1)
        for name, module in linears(model):
            for shape in ((), (1,), (7,), (2, 5), (0,), (3, 0)):
                x = 3 * torch.randn(*shape, module.in_features, generator=generator)
                x = x.to(DTYPES[dtype])
                with torch.no_grad():
                    y = module(x)
                    seen = x if module.rms_norm is None else module.rms_norm(x)
                codes, scale = theirs[name]
                q, a = quantize_activations(seen.float().numpy())
                exact = matmul_int32(codes, q).astype(np.float32) / a[..., None] * scale
                if module.bias is not None:
                    exact = exact + module.bias.detach().float().numpy()
                assert (y.dtype, y.shape) == (x.dtype, (*shape, module.out_features))
                assert torch.equal(y, torch.from_numpy(np.asarray(exact)).to(x.dtype)), name

    def test_they_are_what_transformers_computes_but_for_rounding(
        self, kind: str, dtype: str
    ) -> None:
        model = make_model(kind, DTYPES[dtype])
        for name, module in linears(model):
            x = torch.randn(40, module.in_features, dtype=DTYPES[dtype])
            with torch.no_grad():
                stock = module(x)
                with use_cpu_kernels(module):
                    ours = module(x)
            # Codes at a tie, the products and the sums are rounded to bf16 there, to float32 here.
            assert nmse(ours, stock) < (1e-4 if dtype == "bf16" else 1e-7), name
            assert dtype == "fp32" or not torch.equal(ours, stock)


@pytest.mark.parametrize("kind", KINDS)
class TestModels:
    def test_logits_are_as_near_as_bf16_is_to_fp32(self, kind: str) -> None:
        """The whole model in bf16: our noise beside what rounding to bf16 costs transformers."""
        exact = make_model(kind)
        rough = make_model(kind, torch.bfloat16)
        for (_, same), (_, source) in zip(
            exact.state_dict().items(), rough.state_dict().items(), strict=True
        ):
            same.copy_(source)
        ids = ids_of(2, 34)
        with torch.no_grad():
            truth, stock = exact(ids).logits, rough(ids).logits
            with use_cpu_kernels(rough):
                ours = rough(ids).logits
            with use_cpu_kernels(exact):
                ours_exact = exact(ids).logits
        assert nmse(ours, truth) < 2 * nmse(stock, truth)
        assert nmse(ours_exact, truth) < nmse(stock, truth)

    def test_greedy_text_is_the_same(self, kind: str) -> None:
        model = make_model(kind)
        ids = ids_of(3, 11)
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
        options["attention_mask"] = torch.ones_like(ids)
        stock = model.generate(ids, **options)
        with use_cpu_kernels(model):
            ours = model.generate(ids, **options)
        # Two tokens that are as likely but for rounding may change places, and the text after them.
        for row, other in zip(ours.tolist(), stock.tolist(), strict=True):
            if row != other:
                place = next(i for i in range(len(row)) if row[i] != other[i])
                with torch.no_grad():
                    best = model(torch.tensor([other[:place]])).logits[0, -1].topk(2).values
                assert best[0] - best[1] < 0.05, (row, other)
        assert any(row == other for row, other in zip(ours.tolist(), stock.tolist(), strict=True))


class TestReplacing:
    def test_it_can_be_undone(self) -> None:
        model = make_model("bitnet packed")
        ids = ids_of(1, 9)
        with torch.no_grad():
            before = model(ids).logits
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kernels = use_cpu_kernels(model)
        assert kernels.modules == 14
        assert kernels.nbytes >= sum(m.in_features * m.out_features for _, m in linears(model)) / 4
        assert "14 linears" in repr(kernels)
        assert model.state_dict().keys() == state.keys()
        kernels.restore()
        kernels.restore()
        assert all("forward" not in vars(module) for module in model.modules())
        with torch.no_grad():
            assert torch.equal(model(ids).logits, before)
        copy.deepcopy(model)

    def test_twice_is_once(self) -> None:
        model = make_model("bitnet online")
        first = use_cpu_kernels(model)
        products = [vars(module)["bitllm_product"] for _, module in linears(model)]
        again = use_cpu_kernels(model)
        assert products == [vars(module)["bitllm_product"] for _, module in linears(model)]
        again.restore()
        first.restore()
        assert all("forward" not in vars(module) for module in model.modules())

    def test_a_forward_that_somebody_else_gave_comes_back(self) -> None:
        model = make_model("bitnet online")
        module = linears(model)[3][1]
        module.forward = theirs = lambda x: 2 * x
        use_cpu_kernels(model).restore()
        assert module.forward is theirs

    def test_one_that_fails_leaves_all_as_they_were(self) -> None:
        model = make_model("bitnet offline")
        name, module = linears(model)[-1]
        with torch.no_grad():
            module.weight[2, 3] = 0.5
        with pytest.raises(NotTernaryError, match=rf"{name}: the weights hold 0.5"):
            use_cpu_kernels(model)
        assert all("forward" not in vars(module) for module in model.modules())

    @pytest.mark.parametrize("kind", ["bitnet online", "bitnet packed"])
    def test_weights_that_change_are_packed_again(self, kind: str) -> None:
        model = make_model(kind)
        ids = ids_of(1, 9)
        other = make_model(kind)
        for _, module in linears(other):
            fill(module) if kind == "bitnet packed" else torch.nn.init.normal_(module.weight)
        with torch.no_grad(), use_cpu_kernels(model), use_cpu_kernels(other):
            first = model(ids).logits
            model.load_state_dict(other.state_dict())
            assert not torch.equal(model(ids).logits, first)
            assert torch.equal(model(ids).logits, other(ids).logits)

    def test_threads_change_nothing(self) -> None:
        model = make_model("bitnet packed", hidden_size=1536, intermediate_size=3072)
        ids = ids_of(2, 5)
        logits = []
        for threads in (1, 2, 3):
            with torch.no_grad(), use_cpu_kernels(model, threads=threads):
                parts = [len(vars(m)["bitllm_product"]._parts) for _, m in linears(model)]
                assert max(parts) == threads
                logits.append(model(ids).logits)
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])

    def test_a_child_process_has_threads_of_its_own(self) -> None:
        model = make_model("bitnet packed", hidden_size=1536, intermediate_size=3072)
        module = linears(model)[-1][1]
        x = torch.randn(2, module.in_features)
        with torch.no_grad(), use_cpu_kernels(module, threads=2):
            expected = module(x)
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(0 if torch.equal(module(x), expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_inference_mode_and_hooks(self) -> None:
        with torch.inference_mode():
            model = make_model("bitnet offline")
            seen: list[int] = []
            linears(model)[0][1].register_forward_hook(lambda *_: seen.append(1))
            ids = ids_of(1, 4)
            stock = model(ids).logits
            with use_cpu_kernels(model):
                assert nmse(model(ids).logits, stock) < 1e-3
        assert len(seen) == 2

    def test_a_compiled_model_steps_around_them(self) -> None:
        mlp = make_model("bitnet packed", num_hidden_layers=1).model.layers[0].mlp
        x = torch.randn(1, 3, SIZES["hidden_size"])
        with torch.no_grad(), use_cpu_kernels(mlp):
            compiled = torch.compile(mlp, backend="eager")
            assert nmse(compiled(x), mlp(x)) < 1e-5


class TestRefusals:
    def test_training_mode(self) -> None:
        model = make_model("bitnet online")
        with pytest.raises(ConfigError, match="training mode") as caught:
            use_cpu_kernels(model.train())
        assert "eval()" in str(caught.value.hint)

    def test_gradients(self) -> None:
        model = make_model("bitnet online")
        use_cpu_kernels(model)
        with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.q_proj.*no gradients"):
            model(ids_of(1, 4))
        model.train()
        with torch.no_grad(), pytest.raises(ConfigError, match="no gradients"):
            model(ids_of(1, 4))

    def test_weights_elsewhere(self) -> None:
        model = make_model("bitnet online")
        module = linears(model)[2][1]
        module.weight = torch.nn.Parameter(module.weight.to("meta"))
        with pytest.raises(ConfigError, match="weights on meta") as caught:
            use_cpu_kernels(model)
        assert 'to("cpu")' in str(caught.value.hint)

    def test_input_elsewhere(self) -> None:
        module = linears(make_model("bitnet packed"))[0][1]
        use_cpu_kernels(module)
        with torch.no_grad(), pytest.raises(ConfigError, match="its input is on meta"):
            module(torch.zeros(1, module.in_features, device="meta"))

    def test_bits_that_are_no_code(self) -> None:
        model = make_model("bitnet packed")
        linears(model)[1][1].weight[0, 0] = 0b11
        with pytest.raises(NotTernaryError, match="k_proj: row 0 holds the code 3"):
            use_cpu_kernels(model)

    def test_packed_weights_of_another_type(self) -> None:
        model = make_model("bitnet packed")
        module = linears(model)[1][1]
        module.weight = module.weight.float()
        with pytest.raises(NotTernaryError, match=r"must be uint8, and are torch\.float32"):
            use_cpu_kernels(model)

    def test_masters_that_are_no_numbers(self) -> None:
        model = make_model("bitnet online")
        with torch.no_grad():
            linears(model)[1][1].weight[0, 0] = torch.nan
        with pytest.raises(NotTernaryError, match="k_proj: nan at row 0"):
            use_cpu_kernels(model)

    def test_activations_that_are_no_numbers(self) -> None:
        _, module = linears(make_model("bitnet online"))[0]
        use_cpu_kernels(module)
        x = torch.full((1, module.in_features), torch.inf)
        with torch.no_grad(), pytest.raises(QuantizationError, match="NaN or infinity"):
            module(x)

    def test_activations_of_another_size(self) -> None:
        module = linears(make_model("bitnet online"))[0][1]
        use_cpu_kernels(module)
        with torch.no_grad(), pytest.raises(ConfigError, match=r"132 features.*131"):
            module(torch.zeros(4, 131))

    def test_copies(self) -> None:
        model = make_model("bitnet online")
        use_cpu_kernels(model)
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="restore"):
                copied(model)

    def test_a_model_without_ternary_linears(self) -> None:
        with pytest.raises(UnsupportedModelError, match="Linear has no BitLinear"):
            use_cpu_kernels(torch.nn.Linear(4, 4).eval())

    @pytest.mark.parametrize("threads", [0, 1.5, "two"])
    def test_threads_out_of_range(self, threads: Any) -> None:
        with pytest.raises(ConfigError, match="threads"):
            use_cpu_kernels(make_model("bitnet packed"), threads=threads)

    def test_no_model(self) -> None:
        with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got 'name'"):
            use_cpu_kernels("name")  # type: ignore[arg-type]

    def test_no_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers.integrations", None)
        with pytest.raises(BackendUnavailableError, match="transformers") as caught:
            use_cpu_kernels(torch.nn.Linear(1, 1))
        assert "pip install" in str(caught.value.hint)

    def test_the_module_imports_neither_by_itself(self) -> None:
        import subprocess

        code = (
            "import sys, bitllm.integrations.transformers;"
            "print([m for m in ('torch', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "[]\n", done.stderr
        assert integration.__all__ == ["CpuKernels", "use_cpu_kernels"]

"""Our CPU kernels under a loaded model of transformers: the ternary linears, and nothing else.

    model = AutoModelForCausalLM.from_pretrained("microsoft/bitnet-b1.58-2B-4T")
    kernels = use_cpu_kernels(model)
    model.generate(...)

transformers keeps or makes a dense matrix of the ternary weights and multiplies with that. Here
each `BitLinear` and `AutoBitLinear` gets a packed copy of its weights (2 bits each) and another
`forward`: activations rounded to int8 in float32, an exact integer product, and the scales, as in
`bitllm.ops`. Attention, norms, embedding and head stay PyTorch's. `bitllm.load` runs the whole
model natively and is faster still; this is for programs that are built on transformers.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

import numpy as np
import numpy.typing as npt

from bitllm import ops
from bitllm.checkpoint import DenseTensor
from bitllm.config import as_integer
from bitllm.errors import (
    BackendUnavailableError,
    BitllmError,
    ConfigError,
    NotTernaryError,
    UnsupportedModelError,
)
from bitllm.formats.repack import PackedWeights, pack_codes, quantize_masters, repack_row_strided

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["CpuKernels", "use_cpu_kernels"]

F32 = npt.NDArray[np.float32]

_ROWS_OF_A_PART = 256  # fewer are not worth a thread
_WEIGHTS_OF_A_PART = 1 << 20


def use_cpu_kernels(model: nn.Module, *, threads: int | None = None) -> CpuKernels:
    """Let every ternary linear of a model compute with our CPU kernels, from now on.

    All of them or, where an error is raised, none. A model that has them already is left as it is.
    The model's own weights stay (for `restore`, `save_pretrained` and the like); the packed copies
    take a further quarter of a byte a weight.

    Args:
        model: a model of transformers, or any module, in evaluation mode, with `BitLinear` or
            `AutoBitLinear` modules of `transformers.integrations.bitnet`.
        threads: threads of a product; None = as many as PyTorch uses now.

    Returns:
        What undoes it: `restore`, or the end of a `with` block.

    Raises:
        BackendUnavailableError: PyTorch or transformers is not installed.
        ConfigError: the model is in training mode, or weights are not on the CPU.
        NotTernaryError: a module that should hold ternary codes does not.
        UnsupportedModelError: the model has no ternary linear.
    """
    torch, bitnet = _import_libraries()
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, got {model!r:.80}")
    count = torch.get_num_threads() if threads is None else as_integer("threads", threads, low=1)
    kinds = (bitnet.BitLinear, bitnet.AutoBitLinear)
    linears = [(name, each) for name, each in model.named_modules() if isinstance(each, kinds)]
    if not linears:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no BitLinear or AutoBitLinear module",
            hint="load a model whose config.json has a bitnet quantization_config",
        )
    _check_evaluation(model)
    has_them = [_product_of(module) for _, module in linears]
    products = [
        product or TernaryProduct(name, module, count)
        for product, (name, module) in zip(has_them, linears, strict=True)
    ]
    forwards = [
        torch.compiler.disable(partial(_forward, weakref.ref(module), product))
        for (_, module), product in zip(linears, products, strict=True)
    ]
    for (_, module), product, forward in zip(linears, products, forwards, strict=True):
        if _product_of(module) is None:
            product.previous = module.__dict__.get("forward")
            module.bitllm_product = product
            module.forward = forward
    return CpuKernels([module for _, module in linears])


class CpuKernels:
    """The ternary linears of a model that compute with our kernels; made by `use_cpu_kernels`.

    Attributes:
        modules: how many they are.
        nbytes: bytes of the packed weights.
    """

    def __init__(self, modules: list[Any]) -> None:
        self._modules = modules
        self.modules = len(modules)
        self.nbytes = sum(module.bitllm_product.nbytes for module in modules)

    def restore(self) -> None:
        """Give the modules their own `forward` back and free the packed weights."""
        for module in self._modules:
            product = _product_of(module)
            if product is not None:
                del module.forward, module.bitllm_product
                if product.previous is not None:
                    module.forward = product.previous

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"<CpuKernels of {self.modules} linears, {self.nbytes / 1e6:.1f} MB>"


class TernaryProduct:
    """The product of one linear: y = (q . codes) / a * scale + bias, the sum exact.

    Args:
        name: the module's name in its model, for messages.
        module: a `BitLinear` or `AutoBitLinear`.
        threads: threads of a product.

    Attributes:
        nbytes: bytes of the packed weights.
        previous: the `forward` that somebody else had given this one module, to be put back.

    Raises:
        ConfigError: its tensors are not on the CPU.
        NotTernaryError: its weights are no ternary codes.
    """

    def __init__(self, name: str, module: Any, threads: int) -> None:
        self.name = name
        self.previous: Any = None
        self._threads = threads
        self.prepare(module)

    def __reduce__(self) -> NoReturn:
        """Refuse copies: that of a model would compute with the modules of the first."""
        raise TypeError("a model with CPU kernels cannot be copied or pickled: restore() it first")

    def prepare(self, module: Any) -> None:
        """Pack the weights that the module has now; errors as of the class."""
        weight = module.weight
        for tensor in (weight, getattr(module, "weight_scale", None), module.bias):
            if tensor is not None and tensor.device.type != "cpu":
                raise ConfigError(
                    f"{self.name} has weights on {tensor.device}",
                    hint='move the model with model.to("cpu"), and load it without device_map',
                )
        try:
            packed = _packed_weights(module)
        except BitllmError as error:
            raise NotTernaryError(f"{self.name}: {error.message}", hint=error.hint) from error
        self._scale = np.float32(packed.scales)
        self._bias: F32 | None = None
        if module.bias is not None:
            self._bias = module.bias.detach().float().numpy().copy()
        self._in_features = int(weight.shape[1])
        self._parts = [
            (rows, ops.prepare(packed.packed[rows], self._in_features))
            for rows in _cut(len(packed.packed), self._in_features, self._threads)
        ]
        self.nbytes = sum(part.nbytes for _, part in self._parts)
        self._state = _state_of(module)

    def is_of(self, module: Any) -> bool:
        """Whether the packed weights are those that the module has now."""
        return self._state == _state_of(module)

    def multiply(self, x: F32) -> F32:
        """Return float32 [..., out] for float32 [..., in].

        Raises:
            ConfigError: another number of features.
            QuantizationError: NaN or infinity.
        """
        if x.shape[-1:] != (self._in_features,):
            raise ConfigError(f"{self._in_features} features are wanted, not {x.shape[-1:]}")
        q, a = ops.quantize_activations(x)
        tokens = a.size
        q, a = q.reshape(tokens, self._in_features), a.reshape(tokens, 1)
        y = np.empty((tokens, self._parts[-1][0].stop), np.float32)
        others = [
            _threads().submit(self._part, index, q, a, y) for index in range(1, len(self._parts))
        ]
        try:
            self._part(0, q, a, y)
        finally:
            _finish(others)
        return y.reshape(*x.shape[:-1], y.shape[1])

    def _part(self, index: int, q: npt.NDArray[np.int8], a: F32, y: F32) -> None:
        rows, matrix = self._parts[index]
        out = y[:, rows]
        np.copyto(out, matrix.matmul(q), casting="unsafe")
        out /= a
        out *= self._scale
        if self._bias is not None:
            out += self._bias[rows]


def _forward(
    owner: Callable[[], Any], product: TernaryProduct, input: torch.Tensor
) -> torch.Tensor:
    """What `module(input)` computes instead: [..., in] -> [..., out], in the input's dtype."""
    import torch

    module = owner()
    if module.rms_norm is not None:
        input = module.rms_norm(input)
    if input.device.type != "cpu":
        raise ConfigError(
            f"{product.name} computes with CPU kernels, but its input is on {input.device}",
            hint='move inputs and model with .to("cpu"), or call restore() first',
        )
    if module.training or (
        torch.is_grad_enabled() and (input.requires_grad or module.weight.requires_grad)
    ):
        raise ConfigError(
            f"{product.name} computes with kernels that give no gradients",
            hint="use model.eval() and torch.no_grad(), or call restore() to train",
        )
    if not product.is_of(module):
        product.prepare(module)
    try:
        y = product.multiply(input.detach().float().contiguous().numpy())
    except BitllmError as error:
        raise type(error)(f"{product.name}: {error.message}", hint=error.hint) from error
    return torch.from_numpy(y).to(input.dtype)


def _packed_weights(module: Any) -> PackedWeights:
    """Return the codes and the scale with which a module computes, as transformers would."""
    import torch

    weight = module.weight.detach()
    if not hasattr(module, "online_quant"):  # BitLinear: four rows in a byte, a scale that divides
        if weight.dtype != torch.uint8:
            raise NotTernaryError(f"packed weights must be uint8, and are {weight.dtype}")
        codes = repack_row_strided(weight.contiguous().numpy(), 4 * len(weight))
        return PackedWeights(codes, np.float32(1) / _number(module.weight_scale))
    dense = _dense_tensor(weight)
    if module.online_quant:
        packed = quantize_masters(dense)
        # transformers rounds its quantised weights to the type of the masters.
        rounded = torch.tensor(float(packed.scales)).to(weight.dtype).float()
        return PackedWeights(packed.packed, rounded.numpy())
    return PackedWeights(pack_codes(dense, _codes), _number(module.weight_scale))


def _codes(values: F32) -> F32:
    """Return values that are codes already.

    Raises:
        NotTernaryError: they are not.
    """
    wrong = (values != 0) & (np.abs(values) != 1)
    if wrong.any():
        raise NotTernaryError(
            f"the weights hold {values[wrong][0]}, which is no ternary code",
            hint="a model with master weights has quantization_mode online in its config",
        )
    return values


def _number(scale: torch.Tensor) -> F32:
    return scale.detach().float().numpy().reshape(())


def _dense_tensor(weight: torch.Tensor) -> DenseTensor:
    """Return a matrix as the readers of files see it, without a copy where there can be none."""
    import torch

    weight = weight.contiguous()
    if weight.dtype == torch.bfloat16:  # NumPy has no such type: its bits
        return DenseTensor(weight.view(torch.uint16).numpy(), "bf16")
    if weight.dtype == torch.float16:
        return DenseTensor(weight.numpy(), "f16")
    return DenseTensor(weight.float().numpy(), "f32")


def _state_of(module: Any) -> tuple[Any, ...]:
    """Return what changes with the tensors of a module; inference tensors do not count changes."""
    tensors = (module.weight, getattr(module, "weight_scale", None), module.bias)
    return tuple(
        None if each is None else (each.data_ptr(), 0 if each.is_inference() else each._version)
        for each in tensors
    )


def _cut(rows: int, columns: int, threads: int) -> Iterator[slice]:
    """Cut the rows of a matrix into as many parts as threads are worth their while."""
    most = min(rows // _ROWS_OF_A_PART, rows * columns // _WEIGHTS_OF_A_PART)
    parts = max(1, min(threads, most))
    for part in range(parts):
        yield slice(rows * part // parts, rows * (part + 1) // parts)


def _check_evaluation(model: Any) -> None:
    if model.training:
        raise ConfigError(
            f"{type(model).__name__} is in training mode, and these kernels give no gradients",
            hint="call model.eval() first",
        )


def _product_of(module: Any) -> TernaryProduct | None:
    product: TernaryProduct | None = module.__dict__.get("bitllm_product")
    return product


def _finish(futures: list[Future[None]]) -> None:
    for future in futures:
        future.result()


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="bitllm product")


if hasattr(os, "register_at_fork"):  # a child has none of these threads
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _import_libraries() -> tuple[Any, Any]:
    try:
        import torch
        from transformers.integrations import bitnet
    except ImportError as error:
        raise BackendUnavailableError(
            f"transformers cannot be used: {error}",
            hint="pip install 'bitllm[transformers]'",
        ) from error
    return torch, bitnet

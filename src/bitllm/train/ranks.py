"""The processes of a run: one, or several that torchrun started, over which the model is sharded.

Every rank computes its rows of each batch, so that a recipe means the same run for any number of
ranks. Weights, gradients and optimizer states are sharded by FSDP2, which gathers the whole weight
of a layer before it is used: the scale of a ternary weight, a mean over all of it, is that of one
process. Gradients are summed over the ranks as the rows of one batch are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from bitllm.errors import BackendUnavailableError, ConfigError

__all__ = ["Ranks", "ranks_of_run", "whole"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes that train one model together, as one of them sees them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
        device: what this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, device: Literal["cpu", "cuda"]) -> Ranks:
        """Meet the other processes, where torchrun says that there are some.

        Args:
            device: kind of the device; ranks of one machine take one GPU each.

        Raises:
            BackendUnavailableError: there is no such device, or PyTorch knows no other processes.
            ConfigError: the environment of torchrun is incomplete.
        """
        size = _number("WORLD_SIZE", 1)
        if device == "cuda":
            _select_gpu(_number("LOCAL_RANK", 0))
        if size == 1:
            return cls(0, 1, torch.device(device))
        if not distributed.is_available():
            raise BackendUnavailableError("this PyTorch is built without torch.distributed")
        if not distributed.is_initialized():
            try:
                distributed.init_process_group("nccl" if device == "cuda" else "gloo")
            except (ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"WORLD_SIZE is {size}, but the other processes cannot be met: {error}",
                    hint="start all of them by torchrun, or unset WORLD_SIZE",
                ) from error
        return cls(distributed.get_rank(), size, torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this is the process that logs, and writes what there is one of."""
        return self.rank == 0

    def shard(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        """Move a model to the device, and spread it over the ranks, layer by layer.

        Args:
            model: with equal weights on every rank.
            layers: those of its parts that are gathered on their own.
        """
        model.to(self.device)
        if self.size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def let_go(self, model: nn.Module) -> None:
        """Free what a forward pass without a backward pass has gathered.

        FSDP would go on with it in the next pass, whatever has become of the weights.
        """
        sharded: Any = model
        if self.size > 1:
            sharded.reshard()

    def rows(self, count: int) -> slice:
        """Return which of the `count` rows of a batch are those of this rank.

        Raises:
            ConfigError: they cannot be shared out evenly.
        """
        if count % self.size:
            raise ConfigError(
                f"training.batch_size {count} cannot be shared out evenly among {self.size} ranks",
                hint="choose a batch size that is a multiple of their number",
            )
        part = count // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def sums(self, *values: float) -> list[float]:
        """Add up numbers over the ranks, in float64; all get the same."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor]

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def ranks_of_run(device: Literal["cpu", "cuda"]) -> Iterator[Ranks]:
    """Meet the other processes, and take leave of them at the end; errors as for `Ranks.join`."""
    known = distributed.is_available() and distributed.is_initialized()
    ranks = Ranks.join(device)
    try:
        yield ranks
    finally:
        if ranks.size > 1 and not known:
            distributed.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole one; all ranks have to ask for it."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def _select_gpu(index: int) -> None:
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f'training.device = "cuda" needs GPU {index}, PyTorch {torch.__version__} sees '
            f"{torch.cuda.device_count()}",
            hint="start as many processes on a machine as it has GPUs; on a machine without one "
            'set training.device = "cpu"',
        )
    torch.cuda.set_device(index)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdecimal() and (name != "WORLD_SIZE" or int(text) > 0)):
        raise ConfigError(f"{name} must be a number, got {text!r:.40}", hint="torchrun sets it")
    return int(text)

"""Low-rank adapters in memory: what is added to the products of a model that stays as it is.

For each linear that an adapter changes (LoRA, Hu et al. 2021)

    y = linear(x) + (B (A x)) * scale        A [rank, in], B [out, rank]

x is what the linear is given: after the norm that it shares with its siblings, before a norm of its
own, and before it is rounded to int8. That is what an adapter sees while it is trained: PEFT wraps
the linear and feeds A the input of the whole module. The sum is added behind the bias, again as
there. Data only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bitllm.checkpoint import LINEAR_NAMES, DenseTensor, ModelSpec
from bitllm.errors import TensorShapeError

__all__ = ["Adapter", "LowRankUpdate"]


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """What an adapter adds to one linear.

    Attributes:
        a: [rank, in], f32, bf16 or f16; as a rule a view of a mapped file.
        b: [out, rank].
        scale: multiplies B (A x), in float32.
    """

    a: DenseTensor
    b: DenseTensor
    scale: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class Adapter:
    """A low-rank adapter of a whole model.

    Attributes:
        origin: where it came from, for messages.
        updates: by the canonical name of the linear, such as "layers.3.down".
    """

    origin: str
    updates: Mapping[str, LowRankUpdate]

    @property
    def rank(self) -> int:
        """The largest rank of its updates."""
        return max((update.rank for update in self.updates.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(update.nbytes for update in self.updates.values())

    def check(self, spec: ModelSpec) -> None:
        """Refuse an adapter that was made for another architecture.

        Raises:
            TensorShapeError: a layer that the model lacks, or a matrix of another shape.
        """
        for name, update in self.updates.items():
            _, layer, linear = name.split(".")
            if int(layer) >= len(spec.layers) or linear not in LINEAR_NAMES:
                raise TensorShapeError(
                    f"{self.origin}: the adapter changes {name}, but the model has "
                    f"{len(spec.layers)} layers",
                    hint=_OTHER_MODEL,
                )
            wanted = spec.layers[int(layer)].linear(linear)
            shapes = (update.rank, wanted.in_features), (wanted.out_features, update.rank)
            if (update.a.shape, update.b.shape) != shapes or update.rank < 1:
                raise TensorShapeError(
                    f"{self.origin}: A and B of {name} are {list(update.a.shape)} and "
                    f"{list(update.b.shape)}; at rank {update.rank} the model needs "
                    f"{list(shapes[0])} and {list(shapes[1])}",
                    hint=_OTHER_MODEL,
                )


_OTHER_MODEL = "the adapter was made for another model: see base_model_name_or_path in its config"

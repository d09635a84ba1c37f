"""Drawing tokens on the device, as `bitllm.backends.sampling` draws them on the host.

Equal to it for equal logits, to the token: noise, exponentials and order are the same. Only the
running sum of top-p may be added up in another order on a GPU, in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from bitllm.backends.base import Batch, OutputKind, SamplePlan

__all__ = ["draw", "draws_here"]

_LOG2_E = float(np.float32(1.44269504088896341))
_LN2_HIGH, _LN2_LOW = 0.693359375, float(np.float32(-2.12194440e-4))
_ROUND_MAGIC = 12582912.0  # 1.5 * 2**23
_EXP_COEFFICIENTS = [float(np.float32(1.0 / f)) for f in (5040, 720, 120, 24, 6, 2, 1, 1)]


def draws_here(batch: Batch) -> bool:
    """Whether all that a step wants is tokens, of a plan that `draw` knows.

    Log-probabilities and locally typical sampling are left to the host.
    """
    plan = batch.plan
    return (
        len(batch.output_kinds) > 0
        and bool((batch.output_kinds == OutputKind.SAMPLE).all())
        and bool((plan.top_logprobs < 0).all())
        and bool(((plan.typical_p >= 1) | (plan.temperature == 0)).all())
    )


def draw(plan: SamplePlan, logits: torch.Tensor) -> torch.Tensor:
    """Draw a token for each row of float32 [entries, vocab].

    Returns:
        int64 [entries]: ids, -1 where no logit is above minus infinity.
    """
    adjusted = _adjusted(plan, logits)
    values = adjusted
    hot = plan.temperature > 0
    if hot.any():
        from bitllm.backends.cuda.kernels.noise import perturb

        temperatures = _on(plan.temperature, logits)
        values = perturb(adjusted, temperatures, _on(_keys(plan), logits))
        cut = np.flatnonzero(hot & ((plan.top_k > 0) | (plan.top_p < 1) | (plan.min_p > 0)))
        if len(cut):
            rows = _on(cut, logits)
            dropped = _dropped(plan, cut, adjusted[rows], temperatures[rows])
            values[rows] = values[rows].masked_fill(dropped, -torch.inf)
        # The host keeps no id that is not above minus infinity, NaN among them.
        values = values.masked_fill(~(adjusted > -torch.inf), -torch.inf)
    return _highest(values).where(adjusted.amax(-1) > -torch.inf, -1)


def _keys(plan: SamplePlan) -> npt.NDArray[np.int64]:
    """Return what Philox draws by: seed in two words, position and choice as uint32."""
    low = np.uint64(0xFFFFFFFF)
    parts = [plan.seed & low, plan.seed >> np.uint64(32), plan.position, plan.choice]
    words = [np.asarray(part).astype(np.int64) & 0xFFFFFFFF for part in parts]
    return np.stack(words, axis=1)


def _highest(values: torch.Tensor) -> torch.Tensor:
    """Return the argmax of each row, int64; the lowest id of a tie, the row's length if none."""
    ids = torch.arange(values.shape[-1], device=values.device)
    return torch.where(values == values.amax(-1, keepdim=True), ids, len(ids)).amin(-1)


def _adjusted(plan: SamplePlan, logits: torch.Tensor) -> torch.Tensor:
    """Apply bias, penalties and mask; float32, a new tensor where there are any."""
    if len(plan.bias_ids):
        where = _entries(plan.bias_offsets), _on(plan.bias_ids.astype(np.int64), logits)
        rows = _on(where[0], logits)
        logits = logits.index_put((rows, where[1]), _on(plan.bias_values, logits), accumulate=True)
    if len(plan.seen_ids):
        logits = _penalised(plan, logits)
    if (plan.mask_rows >= 0).any():
        logits = logits.masked_fill(_forbidden(plan, logits), -torch.inf)
    return logits


def _penalised(plan: SamplePlan, logits: torch.Tensor) -> torch.Tensor:
    entries = _entries(plan.seen_offsets)
    rows, ids = _on(entries, logits), _on(plan.seen_ids.astype(np.int64), logits)
    repetition = _on(plan.repetition_penalty[entries], logits)
    frequency = plan.frequency_penalty[entries] * plan.seen_counts.astype(np.float32)
    presence = np.where(plan.seen_counts > 0, plan.presence_penalty[entries], np.float32(0))
    values = logits[rows, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - _on(frequency, logits) - _on(presence, logits)
    return logits.index_put((rows, ids), values)


def _forbidden(plan: SamplePlan, logits: torch.Tensor) -> torch.Tensor:
    """Return which ids the masks forbid, bool [entries, vocab]."""
    ids = torch.arange(logits.shape[-1], device=logits.device)
    words = _on(plan.mask.view(np.int32), logits)[_on(np.maximum(plan.mask_rows, 0), logits)]
    allowed = (words[:, ids // 32] >> (ids % 32).to(torch.int32)) & 1
    masked = _on(plan.mask_rows >= 0, logits)
    return (allowed == 0) & masked[:, None]


def _dropped(
    plan: SamplePlan, rows: npt.NDArray[Any], adjusted: torch.Tensor, temperatures: torch.Tensor
) -> torch.Tensor:
    """Return which ids top-k, top-p and min-p drop, bool [rows, vocab].

    Args:
        plan: of all entries.
        rows: int64, the entries that have a cut.
        adjusted: their logits, float32 [rows, vocab].
        temperatures: float32 [rows].
    """
    vocab = adjusted.shape[-1]
    # Adding 0 makes +0 of -0: equal logits stand in order of their ids.
    ordered, ids = (adjusted + 0.0).sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab, device=adjusted.device)
    top_k = np.where(plan.top_k[rows] > 0, plan.top_k[rows], vocab)
    kept = (rank < _on(top_k, adjusted)[:, None]) & (ordered > -torch.inf)
    scaled = ordered / temperatures[:, None]
    likely = _exp(scaled - scaled[:, :1])
    cumulative = likely.masked_fill(~kept, 0.0).double().cumsum(-1)
    top_p = _on(plan.top_p[rows].astype(np.float64), adjusted)[:, None]
    before = ((cumulative < top_p * cumulative[:, -1:]) & kept).sum(-1, keepdim=True)
    kept &= (rank <= before) | (top_p >= 1)
    min_p = _on(plan.min_p[rows], adjusted)[:, None]
    kept &= (likely >= min_p) | (min_p <= 0) | (rank == 0)
    return torch.ones_like(kept).scatter(1, ids, ~kept)


def _exp(x: torch.Tensor) -> torch.Tensor:
    """e**x as `numerics.exp_f32`, operation by operation."""
    clamped = x.clamp(-87.0, 88.0)
    n = (clamped * _LOG2_E + _ROUND_MAGIC) - _ROUND_MAGIC
    r = (clamped - n * _LN2_HIGH) - n * _LN2_LOW
    p = torch.full_like(r, _EXP_COEFFICIENTS[0])
    for coefficient in _EXP_COEFFICIENTS[1:]:
        p = p * r + coefficient
    power = ((n.nan_to_num().to(torch.int32) + 127) << 23).view(torch.float32)
    return (p * power).masked_fill(x < -87.0, 0.0)


def _entries(offsets: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return the entry of each element of a list in a plan."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _on(values: npt.NDArray[Any], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)

"""From rows of logits to tokens and log-probabilities: the order of `SamplePlan`, spelt out.

Nothing is remembered between calls: the uniforms are a function of (seed, choice, position, token
id), so that what is drawn does not depend on the batch, the backend, or what was drawn before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitllm.backends.base import Batch, OutputKind, SamplePlan, StepOutput
from bitllm.backends.numerics import exp_f32, gumbel_noise, lane_sum, log_f64

__all__ = ["adjust_logits", "draw_token", "kept_ids", "score_row", "step_output"]

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

_NEVER = np.float32(-np.inf)


def step_output(
    batch: Batch,
    vocab_size: int,
    hidden: F32,
    logits: Mapping[int, F32],
    drawn: Mapping[int, int] | None = None,
) -> StepOutput:
    """Return what the rows of a batch asked for.

    Args:
        batch: the step.
        vocab_size: columns of logits.
        hidden: hidden states of all requests after the final norm, float32 [outputs, hidden].
        logits: float32 [vocab] of each request that needs them, by its number.
        drawn: tokens of SAMPLE requests that are known already, by the request's number; such a
            request needs no logits, unless it asks for log-probabilities too.
    """
    wanted = [np.flatnonzero(batch.output_kinds == kind) for kind in range(OutputKind.COUNT)]
    samples, scores = wanted[OutputKind.SAMPLE].tolist(), wanted[OutputKind.SCORE].tolist()
    known = drawn or {}
    sampled = [
        known[row] if row in known else draw_token(batch.plan, entry, logits[row])
        for entry, row in enumerate(samples)
    ]
    rows, targets = samples + scores, [*sampled, *batch.score_targets]
    top_n = np.concatenate([batch.plan.top_logprobs, batch.score_top_n])
    width = max(top_n.max(initial=0), 0)
    full = [logits[row] for row in wanted[OutputKind.LOGITS].tolist()]
    output = StepOutput(
        hidden=hidden[wanted[OutputKind.HIDDEN]],
        logits=np.stack(full) if full else np.zeros((0, vocab_size), np.float32),
        sampled=np.array(sampled, np.int32),
        logprobs=np.full(len(rows), np.nan, np.float32),
        top_ids=np.full((len(rows), width), -1, np.int32),
        top_logprobs=np.full((len(rows), width), np.nan, np.float32),
    )
    for n in np.flatnonzero(top_n >= 0):
        score, ids, logprobs = score_row(logits[rows[n]], int(targets[n]), int(top_n[n]))
        output.logprobs[n] = score
        output.top_ids[n, : len(ids)] = ids
        output.top_logprobs[n, : len(ids)] = logprobs
    return output


def draw_token(plan: SamplePlan, entry: int, logits: F32) -> int:
    """Draw a token id from the model's logits, float32 [vocab], as entry `entry` of the plan asks.

    Returns:
        The id, or -1 where no logit is above minus infinity (the mask allows nothing).
    """
    adjusted = adjust_logits(plan, entry, logits)
    temperature = plan.temperature[entry]
    if not adjusted.max() > _NEVER:
        return -1
    if temperature == 0:
        return int(adjusted.argmax())
    ids = kept_ids(plan, entry, adjusted)
    noise = gumbel_noise(
        int(plan.seed[entry]), int(plan.choice[entry]), int(plan.position[entry]), ids
    )
    values = adjusted[ids].astype(np.float64) / np.float64(temperature) + noise
    return int(ids[values == values.max()].min())


def adjust_logits(plan: SamplePlan, entry: int, logits: F32) -> F32:
    """Apply bias, penalties and mask: float32 [vocab], forbidden ids at minus infinity."""
    adjusted = logits.copy()
    biased = slice(plan.bias_offsets[entry], plan.bias_offsets[entry + 1])
    np.add.at(adjusted, plan.bias_ids[biased], plan.bias_values[biased])

    seen = slice(plan.seen_offsets[entry], plan.seen_offsets[entry + 1])
    ids, counts = plan.seen_ids[seen], plan.seen_counts[seen]
    repetition = plan.repetition_penalty[entry]
    values = adjusted[ids]
    values = np.where(values > 0, values / repetition, values * repetition)
    values = values - plan.frequency_penalty[entry] * counts.astype(np.float32)
    adjusted[ids] = np.where(counts > 0, values - plan.presence_penalty[entry], values)

    row = plan.mask_rows[entry]
    if row >= 0:
        every_id = np.arange(len(logits))
        allowed = plan.mask[row, every_id // 32] >> (every_id % 32).astype(np.uint32) & np.uint32(1)
        adjusted[allowed == 0] = _NEVER
    return adjusted


def kept_ids(plan: SamplePlan, entry: int, adjusted: F32) -> I32:
    """Return the ids that the cuts leave, int32, most likely first (ties: lowest id).

    Temperature must not be 0. Probabilities are exp(l / T - max) in float32, not normalised;
    their running sums are float64.
    """
    ids = _most_likely(adjusted)
    if 0 < plan.top_k[entry] < len(adjusted):
        ids = ids[: plan.top_k[entry]]
    with np.errstate(over="ignore", invalid="ignore"):  # a tiny temperature leaves only the first
        scaled = adjusted[ids] / plan.temperature[entry]
        probabilities = exp_f32(scaled - scaled[0])
    if plan.top_p[entry] < 1:
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        wanted = np.float64(plan.top_p[entry]) * cumulative[-1]
        count = 1 + int((cumulative < wanted).sum())
        ids, probabilities = ids[:count], probabilities[:count]
    if plan.min_p[entry] > 0:
        likely = probabilities >= plan.min_p[entry]
        likely[0] = True
        ids, probabilities = ids[likely], probabilities[likely]
    if plan.typical_p[entry] < 1:
        ids = ids[_typical(probabilities, plan.typical_p[entry])]
    return ids


def _typical(probabilities: F32, wanted: np.float32) -> npt.NDArray[np.intp]:
    """Return which of these are locally typical, in their own order.

    Args:
        probabilities: float32, most likely first, not normalised; those that have vanished are
            the least typical.
        wanted: the share of their sum that is kept.
    """
    weights = np.where(probabilities > 0, probabilities, np.float32(0)).astype(np.float64)
    total = np.cumsum(weights)[-1]
    surprise = np.full(len(weights), np.inf)
    left = weights > 0
    surprise[left] = -(log_f64(weights[left]) - log_f64(total))
    entropy = np.cumsum(weights[left] / total * surprise[left])[-1] if left.any() else 0.0
    order = np.argsort(np.abs(surprise - entropy), kind="stable")
    cumulative = np.cumsum(weights[order])
    count = 1 + int((cumulative < np.float64(wanted) * total).sum())
    return np.sort(order[:count])


def score_row(logits: F32, target: int, top_n: int) -> tuple[np.float32, I32, F32]:
    """Log-probabilities under softmax(logits), float32 [vocab], unchanged by any plan.

    Args:
        logits: of the model, float32 [vocab].
        target: the id to score, or -1 for none.
        top_n: how many of the most likely ids are wanted.

    Returns:
        Log-probability of the target (NaN for none), the most likely ids int32 [<= top_n], most
        likely first (ties: lowest id), and their log-probabilities float32.
    """
    highest = logits.max()
    log_total = log_f64(lane_sum(exp_f32(logits - highest)).astype(np.float64))
    logprobs = ((logits.astype(np.float64) - highest) - log_total).astype(np.float32)
    top = _most_likely(logits)[:top_n]
    return np.float32(np.nan) if target < 0 else logprobs[target], top, logprobs[top]


def _most_likely(logits: F32) -> I32:
    order = np.argsort(-logits, kind="stable").astype(np.int32)
    return order[logits[order] > _NEVER]

"""Scheduler: who runs, how far, and who gives way."""

from __future__ import annotations

from bitllm.engine.blocks import BlockPool
from bitllm.engine.request import Request
from bitllm.engine.scheduler import Scheduler
from bitllm.engine.sequence import Sequence


class Nothing:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(prompt: int, max_tokens: int = 50) -> Sequence:
    return Sequence(Request(prompt_ids=(1,) * prompt, max_tokens=max_tokens), Nothing())


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Schedule a step and pretend it was computed."""
    runs = scheduler.schedule()
    for run in runs:
        samples = run.samples
        run.sequence.computed += run.length
        if samples:
            run.sequence.append(1, None, 1.0)
    return [(run.sequence, run.length) for run in runs]


def make(blocks: int, rows: int, *sequences: Sequence) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(blocks)
    scheduler = Scheduler(pool, rows)
    for each in sequences:
        scheduler.add(each)
    return scheduler, pool


def test_decodes_come_before_the_next_prompt() -> None:
    old, young = sequence(10), sequence(10)
    scheduler, pool = make(8, 12, old, young)
    assert step(scheduler) == [(old, 10), (young, 2)]
    assert step(scheduler) == [(old, 1), (young, 8)]
    assert step(scheduler) == [(old, 1), (young, 1)]
    assert pool.available == 6


def test_idle() -> None:
    scheduler, _ = make(4, 8)
    assert scheduler.schedule() == []
    assert len(scheduler) == 0


def test_a_prompt_waits_until_all_of_it_fits() -> None:
    old, young = sequence(20), sequence(100)
    scheduler, pool = make(4, 64, old, young)
    assert step(scheduler) == [(old, 20)]
    assert step(scheduler) == [(old, 1)]
    scheduler.remove(old)
    assert step(scheduler) == [(young, 64)]
    assert pool.available == 2  # the rest is taken when it is computed


def test_nobody_overtakes_one_that_waits_for_blocks() -> None:
    """`long` was let in when all of it fitted, then `old` grew into one of its blocks."""
    old, long, short = sequence(64), sequence(96), sequence(5)
    scheduler, pool = make(5, 65, old, long, short)
    assert step(scheduler) == [(old, 64), (long, 1)]
    assert step(scheduler) == [(old, 1)]
    assert pool.available == 1  # enough for `short`, but `long` came before
    scheduler.remove(old)
    assert step(scheduler) == [(long, 60), (short, 5)]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    old, young, waiting = sequence(31), sequence(30), sequence(1)
    scheduler, pool = make(2, 64, old, young, waiting)
    assert step(scheduler) == [(old, 31), (young, 30)]
    assert step(scheduler) == [(old, 1), (young, 1)]
    assert step(scheduler) == [(old, 1)]
    assert (young.computed, young.block_ids, pool.available) == (0, [], 0)
    scheduler.remove(old)
    assert step(scheduler) == [(young, 32), (waiting, 1)]


def test_remove_frees_and_forgets() -> None:
    running, waiting = sequence(64), sequence(64)
    scheduler, pool = make(2, 64, running, waiting)
    step(scheduler)
    scheduler.remove(waiting)
    scheduler.remove(running)
    scheduler.remove(running)
    assert (len(scheduler), pool.available) == (0, 2)


def test_restart_keeps_the_order_and_drops_what_has_ended() -> None:
    done, old, young = sequence(5), sequence(5), sequence(5)
    scheduler, pool = make(8, 64, done, old, young)
    step(scheduler)
    done.finish_reason = "stop"
    scheduler.restart()
    assert (len(scheduler), pool.available) == (2, 8)
    assert step(scheduler) == [(old, 6), (young, 6)]

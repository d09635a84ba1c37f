"""Scheduler: who runs, how far, and who gives way."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import pytest

from bitllm.engine import blocks as blocks_module
from bitllm.engine import scheduler as scheduler_module
from bitllm.engine.blocks import BlockPool
from bitllm.engine.request import Request
from bitllm.engine.scheduler import PLACES_PER_PRIORITY, Scheduler
from bitllm.engine.sequence import Sequence


class Nothing:
    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def sequence(prompt: int, max_tokens: int = 50, **options: Any) -> Sequence:
    return Sequence(Request(prompt_ids=(1,) * prompt, max_tokens=max_tokens, **options), Nothing)


def choices(count: int, prompt: int, **options: Any) -> list[Sequence]:
    request = Request(prompt_ids=(1,) * prompt, max_tokens=50, choices=count, **options)
    return [Sequence(request, Nothing, choice) for choice in range(count)]


def step(scheduler: Scheduler) -> list[tuple[Sequence, int]]:
    """Schedule a step and pretend it was computed."""
    runs = scheduler.schedule()
    for run in runs:
        drawers = run.drawers
        scheduler.advance(run)
        if drawers:
            scheduler.fork(run.sequence)
        for each in drawers:
            each.append(1, None, 1.0)
    return [(run.sequence, run.length) for run in runs]


def make(blocks: int, rows: int, *sequences: Sequence) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(blocks)
    scheduler = Scheduler(pool, rows, prefix_cache=False)  # all of these prompts begin alike
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


def test_a_sequence_put_back_has_its_rank_again() -> None:
    first, second, third = (sequence(4, priority=each) for each in (0, 1, 0))
    scheduler, pool = make(8, 4, first, second, third)
    assert step(scheduler) == [(first, 4)]
    scheduler.remove(first)
    assert pool.available == 8
    assert step(scheduler) == [(third, 4)]
    scheduler.put_back(first)
    assert step(scheduler) == [(first, 3), (third, 1)]
    assert step(scheduler) == [(first, 2), (third, 1), (second, 1)]


def test_restart_keeps_the_order_and_drops_what_has_ended() -> None:
    done, old, young = sequence(5), sequence(5), sequence(5)
    scheduler, pool = make(8, 64, done, old, young)
    step(scheduler)
    done.finish_reason = "stop"
    scheduler.restart()
    assert (len(scheduler), pool.available) == (2, 8)
    assert step(scheduler) == [(old, 6), (young, 6)]


def test_a_long_prompt_leaves_half_of_the_rows_to_short_ones_behind_it() -> None:
    long, next_long, short, middle = (sequence(length) for length in (100, 100, 10, 25))
    scheduler, _ = make(16, 64, long, next_long, short, middle)
    assert step(scheduler) == [(long, 54), (short, 10)]  # 22 are left, too few for all of `middle`
    assert step(scheduler) == [(long, 46), (next_long, 17), (short, 1)]
    assert step(scheduler) == [(long, 1), (next_long, 37), (short, 1), (middle, 25)]


def test_lower_priorities_go_first_and_arrival_decides_among_equals() -> None:
    usual, late, urgent, behind = (sequence(4, priority=each) for each in (0, 0, -1, 1))
    scheduler, _ = make(16, 4, usual, late, behind, urgent)
    assert step(scheduler) == [(urgent, 4)]
    scheduler.remove(urgent)
    for each in (usual, late, behind):
        assert step(scheduler) == [(each, 4)]
        scheduler.remove(each)


def test_an_urgent_request_takes_blocks_from_those_behind_it() -> None:
    old, young, urgent = sequence(64), sequence(64), sequence(20, priority=-1)
    scheduler, _ = make(4, 64, old, young)
    assert step(scheduler) == [(old, 64)]
    assert step(scheduler) == [(old, 1)]
    scheduler.add(urgent)
    assert step(scheduler) == [(urgent, 20), (old, 1)]  # into the block too few for `young`
    assert scheduler.preemptions == 0
    scheduler.add(more := sequence(64, priority=-1))
    assert step(scheduler) == [(urgent, 1), (more, 62)]  # one row was meant for `old`
    assert (old.block_ids, scheduler.preemptions) == ([], 1)


def test_what_others_have_in_prospect_is_room_for_an_urgent_request() -> None:
    """`old` has one block of five and needs three more, as does `urgent`."""
    old, urgent = sequence(97), sequence(69, priority=-1)
    scheduler, _ = make(5, 2, old)
    assert step(scheduler) == [(old, 2)]
    scheduler.add(urgent)
    assert step(scheduler) == [(urgent, 2)]


def test_prompts_let_in_go_on_while_another_waits_for_blocks() -> None:
    first, old, urgent = sequence(64, priority=-2), sequence(40), sequence(90, priority=-1)
    scheduler, _ = make(5, 8)
    scheduler.add(first)
    for _ in range(8):
        assert step(scheduler) == [(first, 8)]
    scheduler.add(old)
    assert step(scheduler) == [(first, 1), (old, 7)]
    scheduler.add(urgent)
    assert step(scheduler) == [(first, 1), (old, 7)]
    assert scheduler.preemptions == 0


def test_a_request_that_cannot_fit_preempts_nobody() -> None:
    first, low = sequence(64), sequence(20, priority=1)
    scheduler, _ = make(4, 64, first, low)
    step(scheduler)
    assert step(scheduler) == [(first, 1), (low, 20)]
    scheduler.add(sequence(64))  # before `low`, but `first` has three of the four blocks
    assert step(scheduler) == [(first, 1), (low, 1)]
    assert scheduler.preemptions == 0


def test_no_priority_is_overtaken_for_ever() -> None:
    """One of priority 1, while another of priority 0 comes at each step and fills the decoder."""
    patient = sequence(32, priority=1)
    scheduler, _ = make(1, 32, patient)
    served = []
    while patient not in served:
        scheduler.add(sequence(32, max_tokens=1))
        ((chosen, _),) = step(scheduler)
        scheduler.remove(chosen)
        served.append(chosen)
    assert len(served) == PLACES_PER_PRIORITY


def test_choices_share_the_prompt_and_copy_the_block_they_write_to() -> None:
    first, second, third = choices(3, prompt=40)
    scheduler, pool = make(8, 64)
    scheduler.add(first, second, third)
    assert step(scheduler) == [(first, 40)]
    assert first.block_ids == second.block_ids == third.block_ids
    assert pool.available == 6
    runs = scheduler.schedule()
    assert [run.copy is None for run in runs] == [False, False, True]  # the last one need not
    shared, last = first.block_ids[0], third.block_ids[1]
    assert [run.copy[0] for run in runs if run.copy] == [last, last]
    assert second.block_ids[0] == third.block_ids[0] == shared
    assert len({each.block_ids[1] for each in (first, second, third)}) == 3
    assert pool.available == 4


def test_another_choice_reads_the_prompt_when_the_first_has_left() -> None:
    first, second, third = choices(3, prompt=40)
    scheduler, pool = make(8, 32)
    scheduler.add(first, second, third)
    assert step(scheduler) == [(first, 32)]
    scheduler.remove(first)
    scheduler.remove(third)
    assert (len(scheduler), pool.available) == (1, 8)
    assert step(scheduler) == [(second, 32)]
    assert step(scheduler) == [(second, 8)]
    assert second.generated == 1


def test_a_prompt_that_is_all_in_the_cache_computes_its_last_token() -> None:
    first, second, third = (sequence(64, max_tokens=5) for _ in range(3))
    pool = BlockPool(4)
    scheduler = Scheduler(pool, 64)
    scheduler.add(first)
    assert step(scheduler) == [(first, 64)]
    scheduler.add(second)
    (_, run) = scheduler.schedule()
    assert (run.sequence, run.length, second.cached_tokens) == (second, 1, 63)
    assert run.copy == (first.block_ids[1], second.block_ids[1])
    assert second.block_ids[0] == first.block_ids[0]
    scheduler.remove(first)
    scheduler.remove(second)
    scheduler.add(third)
    (run,) = scheduler.schedule()
    assert (run.length, run.copy) == (1, None)  # nobody else reads the block
    assert pool.find(third.block_key(1)) is None  # nor may anybody, before the step is done
    scheduler.advance(run)
    assert pool.find(third.block_key(1)) == third.block_ids[1]
    assert scheduler.cached_tokens == 2 * 63


def test_a_prompt_in_the_cache_needs_a_block_for_the_copy_of_its_last() -> None:
    first, second = sequence(64), sequence(64)
    pool = BlockPool(3)
    scheduler = Scheduler(pool, 64)
    scheduler.add(first)
    assert step(scheduler) == [(first, 64)]
    scheduler.add(second)
    assert step(scheduler) == [(first, 1)]  # into the last block
    assert (scheduler.waiting, scheduler.preemptions) == ([second], 0)


def test_an_adapter_has_blocks_of_its_own() -> None:
    scheduler = Scheduler(BlockPool(8), 64)
    for name, cached in ((b"", 0), (b"adapter", 0), (b"", 31), (b"adapter", 31)):
        each = sequence(32, prefix_key=name)
        scheduler.add(each)
        step(scheduler)
        assert each.cached_tokens == cached
        scheduler.remove(each)


class InterruptAt:
    """Raises KeyboardInterrupt before the given line, in order of execution, of two modules.

    Args:
        line: how many lines are let through.
    """

    def __init__(self, line: int) -> None:
        self.left = line
        self._files = {inspect.getfile(each) for each in (scheduler_module, blocks_module)}

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_an_interrupt_at_any_line_loses_no_sequence(steps: int) -> None:
    """Of letting in, preempting, forking and keeping; after it all is computed again."""
    line, interrupted = 1, True
    while interrupted:
        pool = BlockPool(5)
        scheduler = Scheduler(pool, 64)
        group, others = choices(3, prompt=40), [sequence(70), sequence(33, priority=-1)]
        scheduler.add(*group)
        for each in others:
            scheduler.add(each)
        for _ in range(steps):
            step(scheduler)
        interrupted = False
        outer = sys.gettrace()
        sys.settrace(InterruptAt(line))
        try:
            step(scheduler)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(outer)
        scheduler.restart()
        assert pool.available == 5
        pending = [*group, *others]
        for _ in range(200):
            for run_of, _ in step(scheduler):
                if run_of.generated >= 10:
                    scheduler.remove(run_of)
        assert all(each.generated >= 10 for each in pending), line
        assert pool.available == 5
        line += 1
    assert line > 50

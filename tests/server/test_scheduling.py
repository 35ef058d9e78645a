"""When a batch goes and what is refused for want of time, by a clock that the tests turn."""

import asyncio
import concurrent.futures

import numpy as np
import pytest
import tritonclient.grpc as stock

from aqt_server.batcher import Batcher, Company
from aqt_server.errors import DeadlineExceeded, Overloaded
from aqt_server.policies import Policy
from aqt_server.service_time import ServiceTime
from aqt_server.statistics import Statistics
from bundles import reference, write_linear
from engine.contractions import assert_same_bits
from server.messages import MODEL, raises_status, stock_input, x_of
from server.test_batcher import Doubling, rows, until_computing
from server_process import WAIT_S, serving

AT_ONCE = Company()


class Clock(asyncio.SelectorEventLoop):
    """An event loop in which only the test moves the time."""

    now = 1000.0

    def time(self):
        return self.now


async def turn(seconds):
    """Moves the time, after what is under way has begun, and lets everything happen that is due."""
    for moved in (0, seconds):
        asyncio.get_running_loop().now += moved
        for _ in range(10):
            await asyncio.sleep(0)


def with_batcher(test, *, company=AT_ONCE, queue_rows=100):
    async def main():
        program = Doubling()
        batcher = Batcher(
            program,
            max_batch_rows=8,
            queue_rows=queue_rows,
            statistics=Statistics(),
            company=company,
        )
        try:
            await test(program, batcher)
        finally:
            program.gate.set()
            await batcher.close(60)

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(main())


def ask(batcher, *values, **given):
    return asyncio.create_task(batcher.run(rows(*values), **given))


async def computed_in(program, batcher, seconds, count=1):
    """Computes `count` rows, which takes `seconds`."""
    program.gate.clear()
    program.started.clear()
    task = ask(batcher, *[0] * count)
    await until_computing(program)
    await turn(seconds)
    program.gate.set()
    await task
    program.started.clear()


def test_the_average_follows_what_is_measured():
    measured = ServiceTime()
    assert measured.expected((), 8) == 0
    measured.add((), 8, 1.0)
    assert (measured.expected((), 5), measured.expected((), 100)) == (1.0, 1.0)
    # Of smaller batches nothing is known, nor of other groups.
    assert (measured.expected((), 4), measured.expected((16,), 8)) == (0, 0)
    measured.add((), 7, 2.0)
    assert measured.expected((), 8) == pytest.approx(1.2)
    for _ in range(60):
        measured.add((), 8, 3.0)
    assert measured.expected((), 8) == pytest.approx(3.0, rel=1e-4)


def test_what_cannot_be_answered_in_time_is_refused_at_once():
    async def test(program, batcher):
        await computed_in(program, batcher, 2.0)
        await computed_in(program, batcher, 4.0, count=8)
        program.gate.clear()
        now = asyncio.get_running_loop().time()
        # Idle, it takes everything: for all it knows, the next one is faster.
        first = ask(batcher, 1, answer_by=now + 1.0)
        await until_computing(program)
        await turn(0.5)
        now += 0.5
        # 1.5 s until the first is done, and 2 s for one row.
        with pytest.raises(DeadlineExceeded, match=r"in 1\.5 s and answered in 3\.5 s"):
            await batcher.run(rows(2), answer_by=now + 3.4)
        # A timeout is for the wait alone.
        with pytest.raises(DeadlineExceeded, match=r"computed in 1\.5 s"):
            await batcher.run(rows(2), deadline=now + 1.4)
        taken = [ask(batcher, 3, answer_by=now + 3.6), ask(batcher, 4, deadline=now + 1.6)]
        await turn(0)
        assert batcher.pending_requests == 2
        # A full batch of 4 s before it; with a higher priority it would not have to wait for that.
        full = ask(batcher, *range(7))
        await turn(0)
        with pytest.raises(DeadlineExceeded, match="as 9 rows wait before it"):
            await batcher.run(rows(5), answer_by=now + 7.4)
        taken += [full, ask(batcher, 6, priority=1, answer_by=now + 3.6)]
        program.gate.set()
        await asyncio.gather(first, *taken)
        # What was refused was never computed.
        computed = sorted(value for batch in program.batches[2:] for value in batch)
        assert computed == sorted([1, 3, 4, *range(7), 6])

    with_batcher(test)


def test_what_took_now_more_and_now_less_is_given_more_time():
    measured = ServiceTime()
    for seconds in (1.0, 1.5, 0.5, 1.5, 0.5) * 20:
        measured.add((), 8, seconds)
    mean = measured.expected((), 8)
    assert 0.8 < mean < 1.2
    assert 1.5 < measured.most((), 8) < 2.6
    start, end = measured.behind((), 24, 8, 8)
    assert start == pytest.approx(3 * mean)
    drift = 0.15 * start
    assert end == pytest.approx(4 * mean + drift + 2 * (measured.most((), 8) - mean))


def test_room_before_the_deadline_grows_with_what_comes_late_and_shrinks_with_what_does_not():
    measured = ServiceTime()
    measured.add((), 8, 1.0)

    def allowed():
        start, end = measured.behind((), 24, 8, 8)
        return end - start - 1.0

    least = allowed()
    assert least == pytest.approx(0.15 * 3)
    measured.taken(late=True)
    assert allowed() > least
    # Steady where three of a thousand are late, and never beyond twice as long again.
    for _ in range(10):
        before = allowed()
        for i in range(1000):
            measured.taken(late=i < 3)
        assert allowed() == pytest.approx(before, rel=0.01)
    for _ in range(100):
        measured.taken(late=True)
    assert allowed() == pytest.approx(6.0)
    for _ in range(100_000):
        measured.taken(late=False)
    assert 0 < allowed() < least


def test_whatever_was_taken_is_counted_once_as_in_time_or_late(monkeypatch):
    counted = []
    monkeypatch.setattr(ServiceTime, "taken", lambda self, *, late: counted.append(late))

    async def test(program, batcher):
        await computed_in(program, batcher, 2.0)
        program.gate.clear()
        now = asyncio.get_running_loop().time()
        # Taken as all is idle, so that it says nothing of what was foreseen.
        first = ask(batcher, 0, answer_by=now + 1)
        await until_computing(program)
        with pytest.raises(DeadlineExceeded, match="its time is up before"):
            await batcher.run(rows(1), answer_by=now + 1)
        leaves, dropped = (ask(batcher, 1, answer_by=now + by) for by in (4.4, 4.5))
        in_time = ask(batcher, 2, answer_by=now + 100)
        # A timeout is for the wait alone, and this one says nothing of its answer.
        waits = ask(batcher, 5, deadline=now + 4, answer_by=now + 100)
        await turn(4.45)
        with pytest.raises(DeadlineExceeded):
            await waits
        assert counted == []
        leaves.cancel()
        await turn(0)
        assert counted == [True]
        program.started.clear()
        program.gate.set()
        await asyncio.gather(first, in_time)
        with pytest.raises(DeadlineExceeded, match="could not be computed in its time"):
            await dropped
        assert counted == [True, True, False]
        program.gate.clear()
        program.started.clear()
        together = (
            ask(batcher, 0),
            ask(batcher, 3, answer_by=asyncio.get_running_loop().time() + 10),
        )
        await until_computing(program)
        await turn(9.9)
        program.gate.set()
        await asyncio.gather(*together)
        # Its answer is there a moment before its time, and does not arrive in it.
        assert counted == [True, True, False, True]

    with_batcher(test)


@pytest.mark.parametrize(
    ("answer_s", "waited_s", "expected"),
    [(12, 5.5, [True, False, False]), (7, 3, [False, False])],
    ids=["had time for a whole batch", "never had"],
)
def test_a_batch_that_is_cut_for_what_waited_too_long_counts_as_late(
    answer_s, waited_s, expected, monkeypatch
):
    counted = []
    monkeypatch.setattr(ServiceTime, "taken", lambda self, *, late: counted.append(late))

    async def test(program, batcher):
        await computed_in(program, batcher, 2.0)
        await computed_in(program, batcher, 8.0, count=8)
        program.gate.clear()
        first = ask(batcher, 0)
        await until_computing(program)
        now = asyncio.get_running_loop().time()
        cut = ask(batcher, 1, answer_by=now + answer_s)
        others = ask(batcher, *[2] * 7, answer_by=now + 100)
        await turn(waited_s)
        program.gate.set()
        await asyncio.gather(first, cut, others)

    with_batcher(test)
    assert counted == expected


def test_who_has_too_little_time_is_told_when_the_others_are_out_of_the_way():
    async def test(program, batcher):
        await computed_in(program, batcher, 2.0)
        program.gate.clear()
        now = asyncio.get_running_loop().time()
        first = ask(batcher, 1)
        await until_computing(program)
        # Answered in 4 s: a second after its time, and never in the time of the other.
        with pytest.raises(DeadlineExceeded) as refused:
            await batcher.run(rows(2), answer_by=now + 3.0)
        assert refused.value.retry_s == pytest.approx(1.0)
        with pytest.raises(DeadlineExceeded) as refused:
            await batcher.run(rows(2), answer_by=now + 1.9)
        assert refused.value.retry_s is None
        program.gate.set()
        await first

    with_batcher(test)


def test_behind_a_full_batch_a_request_is_expected_to_go_in_a_full_one():
    measured = ServiceTime()
    measured.add((), 1, 2.0)
    measured.add((), 8, 4.0)
    assert measured.behind((), 0, 1, 8) == (0, 2.0)
    assert measured.behind((), 4, 1, 8) == (0, 4.0)
    assert measured.behind((), 17, 1, 8) == (8.0, pytest.approx(8.0 * 1.15 + 4.0))


def test_what_is_late_in_its_turn_is_refused_and_no_batch_outgrows_the_time_of_its_requests():
    async def test(program, batcher):
        await computed_in(program, batcher, 2.0)
        await computed_in(program, batcher, 4.0, count=8)
        program.gate.clear()
        now = asyncio.get_running_loop().time()
        first = ask(batcher, 0)
        await until_computing(program)
        # Expected to begin in 2 s; it will be in 3.
        late = ask(batcher, 1, answer_by=now + 4.5)
        in_time = ask(batcher, 2, answer_by=now + 6.0)
        company = ask(batcher, *range(10, 17))
        await turn(3.0)
        program.started.clear()
        program.gate.set()
        await first
        with pytest.raises(DeadlineExceeded, match="could not be computed in its time"):
            await late
        await asyncio.gather(in_time, company)
        # Together the two would take 4 s, and one alone takes 2.2 by now, or 2.8 at the most.
        assert program.batches[3:] == [[2.0], [float(n) for n in range(10, 17)]]

    with_batcher(test)


def test_a_version_that_was_slow_once_is_tried_again_when_it_is_idle():
    async def test(program, batcher):
        await computed_in(program, batcher, 1000.0)
        for _ in range(3):
            answer = await batcher.run(rows(1), answer_by=asyncio.get_running_loop().time() + 1)
            assert answer.outputs["y"] == 2

    with_batcher(test)


def test_requests_wait_for_a_full_batch_no_longer_than_they_may():
    async def test(program, batcher):
        program.gate.set()
        first = ask(batcher, 1)
        await turn(0.05)
        second = ask(batcher, 2, 3)
        await turn(0.04)
        assert program.batches == []
        await turn(0.011)
        await asyncio.gather(first, second)
        assert program.batches == [[1, 2, 3]]
        # A full batch waits for nothing.
        await asyncio.gather(*(ask(batcher, i) for i in range(8)))
        assert program.batches[1] == list(range(8))

    with_batcher(test, company=Company(delay_s=0.1))


def test_batches_are_of_preferred_sizes_while_there_is_time():
    async def test(program, batcher):
        program.gate.set()
        asked = [ask(batcher, i) for i in range(5)]
        await asyncio.gather(*asked[:4])
        assert program.batches == [[0, 1, 2, 3]]
        assert not asked[4].done()
        await turn(0.11)
        await asked[4]
        assert program.batches == [[0, 1, 2, 3], [4]]

    with_batcher(test, company=Company(delay_s=0.1, rows=(2, 4)))


def test_no_request_waits_for_company_for_more_than_half_of_its_time():
    async def test(program, batcher):
        program.gate.set()
        asked = ask(batcher, 1, deadline=asyncio.get_running_loop().time() + 3.0)
        await turn(1.4)
        assert program.batches == []
        await turn(0.2)
        assert (await asked).outputs["y"] == 2

    with_batcher(test, company=Company(delay_s=10.0))


def test_a_low_priority_is_overtaken_only_within_its_head_start():
    async def test(program, batcher):
        first = ask(batcher, *[0] * 8)
        await until_computing(program)
        low = ask(batcher, 10, priority=3)
        await turn(1.9)
        overtaking = ask(batcher, 1, priority=1)
        await turn(0.2)
        # However many of these come, it is not held up by them.
        later = [ask(batcher, *[2] * 8, priority=1) for _ in range(3)]
        equal = ask(batcher, 11, priority=3)
        await turn(0)
        program.gate.set()
        await asyncio.gather(first, low, overtaking, *later, equal)
        assert program.batches[1] == [1, 10]
        assert program.batches[-1] == [11]

    with_batcher(test)


def test_a_policy_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="preferred_rows needs max_delay_ms"):
        Policy(preferred_rows=(4,))


def test_a_queue_of_a_model_can_be_shorter():
    async def test(program, batcher):
        first = ask(batcher, 1)
        await until_computing(program)
        waiting = ask(batcher, 2, 3)
        await turn(0)
        with pytest.raises(Overloaded, match="queue of 2"):
            await batcher.run(rows(4))
        program.gate.set()
        await asyncio.gather(first, waiting)

    with_batcher(test, queue_rows=2)


@pytest.mark.slow
def test_the_policy_of_a_model_reaches_its_queue(tmp_path):
    root = tmp_path / "repository"
    write_linear(root / MODEL / "1")
    file = tmp_path / "policies.toml"
    # An hour for company: only a batch of the preferred size goes.
    file.write_text(f"[{MODEL}]\nqueue_rows = 3\nmax_delay_ms = 3600000\npreferred_rows = [2]\n")
    with (
        serving(root, "--model-policies", str(file), log=tmp_path / "log") as server,
        stock.InferenceServerClient(server.address) as client,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        x = x_of(2)
        asked = [pool.submit(client.infer, MODEL, [stock_input(row[None])]) for row in x]
        found = np.concatenate([task.result(WAIT_S).as_numpy("y") for task in asked])
        assert_same_bits(found, reference(root / MODEL / "1", x))
        (counted,) = client.get_inference_statistics(MODEL).model_stats
        assert [b.batch_size for b in counted.batch_stats] == [2]
        with raises_status("INVALID_ARGUMENT", "4 rows, and the server takes at most 3"):
            client.infer(MODEL, [stock_input(x_of(4))])
        batching = client.get_model_config(MODEL).config.dynamic_batching
        assert list(batching.preferred_batch_size) == [2]
        assert batching.max_queue_delay_microseconds == 3_600_000_000

"""Sleeping: naps of threads on a futex, and tasks that sleep in the stead of a loop that has nothing to do."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from queue import Empty

import pytest

from tests.memq.helpers import DEADLINE, FORK, Thread, end, few_descriptors, kill, until
from tests.support import threads
from upipe.errors import QueueClosed
from upipe.memq import segment
from upipe.memq._ring import Lull, Ring
from upipe.memq.queue import MemQ
from upipe.memq.wakeup import lull


def asleep(pid: int) -> bool:
    return segment.process_state(pid) == "S"


OFTEN = 16
"""As in _ring.pyx."""
TRIPS = 50
"""More than twice as many."""


def sleeps_in(thread: int, how: str) -> bool:
    """A nap is FUTEX_WAIT on memory that is shared; who waits for Python's lock waits in private memory (its second
    argument is not 0)."""
    task = Path(f"/proc/self/task/{thread}")
    call = task.joinpath("syscall").read_text().split()
    nap = "futex" in task.joinpath("wchan").read_text() and len(call) > 2 and call[2] == "0x0"
    return nap if how == "nap" else "poll" in task.joinpath("wchan").read_text()


def test_a_thread_that_naps_is_woken_by_a_frame_and_by_close(queue):
    q = queue(4096)
    getting = Thread(q.get)
    until(lambda: q.stats().empty_waits, "the nap")
    q.put(5)
    assert getting.result() == 5
    getting = Thread(q.get)
    until(lambda: q.stats().empty_waits > 1, "the second nap")
    q.close()
    with pytest.raises(QueueClosed):
        getting.result()


def test_several_threads_that_nap_in_one_slot_all_get_their_frames(queue):
    q = queue(4096)
    threads = [Thread(q.get) for _ in range(8)]
    until(lambda: q.stats().empty_waits >= 8, "naps")
    for number in range(8):
        q.put(number)
    assert sorted(t.result() for t in threads) == list(range(8))


def answer_on_one_cpu(questions, answers, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    for question in questions:
        answers.put(question)


def answer_when_there_is_time(questions, answers, cpu: int) -> None:
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a wake of ours takes the CPU from nobody
    answer_on_one_cpu(questions, answers, cpu)


@contextmanager
def answered_by(answer, queue, child):
    """(questions, answers): queues to a process that answers on the one CPU that is ours, too, for as long."""
    questions, answers = queue(65536), queue(65536)
    cpus = os.sched_getaffinity(0)
    answering = child(answer, questions, answers, min(cpus))
    os.sched_setaffinity(0, {min(cpus)})
    try:
        yield questions, answers
    finally:
        os.sched_setaffinity(0, cpus)
    questions.close()
    end(answering)


def test_two_processes_on_one_cpu_give_way_to_each_other_instead_of_sleeping(queue, child):
    with answered_by(answer_on_one_cpu, queue, child) as (questions, answers):

        def mostly_awake() -> bool:  # unless somebody else takes the CPU: then they sleep for a while
            before = questions.stats().empty_waits + answers.stats().empty_waits
            for number in range(TRIPS):
                questions.put(number)
                assert answers.get(timeout=DEADLINE) == number
            return questions.stats().empty_waits + answers.stats().empty_waits - before < TRIPS // 2

        until(mostly_awake, "an exchange without many sleeps")


def test_a_task_gives_way_on_one_cpu_before_it_asks_whether_its_loop_is_idle(queue, child):
    with answered_by(answer_when_there_is_time, queue, child) as (questions, answers):

        async def exchange() -> int:
            loop, busy = asyncio.get_running_loop(), True

            def again() -> None:
                if busy:
                    loop.call_soon(again)

            again()  # so that this loop is never idle
            before = answers.stats().empty_waits
            for number in range(TRIPS):
                await questions.aput(number)
                assert await answers.aget(DEADLINE) == number
            busy = False
            return answers.stats().empty_waits - before

        until(lambda: asyncio.run(exchange()) < TRIPS // 2, "an exchange with few waits in the loop")


def test_a_poll_gives_way_to_nobody(queue, child):
    with answered_by(answer_when_there_is_time, queue, child) as (questions, answers):

        async def answered_at_once(timeout: float) -> int:
            count = 0
            for number in range(TRIPS):
                await questions.aput(number)
                try:
                    answer = await answers.aget(timeout)
                    count += 1
                except Empty:
                    answer = await answers.aget(DEADLINE)
                assert answer == number
            return count

        assert asyncio.run(answered_at_once(DEADLINE)) == TRIPS  # now it runs, on this CPU
        found = [asyncio.run(answered_at_once(0)) for _ in range(20)]
    assert sum(found[10:]) < 5 * TRIPS, found  # who gives way does so reluctantly at first


def test_a_thread_and_a_task_on_one_handle_both_get_their_frame(queue):
    q = queue(4096)

    async def both() -> list[int]:
        thread = asyncio.get_running_loop().run_in_executor(None, q.get)
        task = asyncio.create_task(q.aget())
        await asyncio.to_thread(until, lambda: q.stats().empty_waits >= 2)
        q.put(1)
        q.put(2)
        return sorted(await asyncio.gather(thread, task))

    assert asyncio.run(asyncio.wait_for(both(), DEADLINE)) == [1, 2]


def test_a_timeout_ends_a_nap(queue):
    q = queue(4096)
    began = time.monotonic()
    with pytest.raises(Empty):
        q.get(timeout=0.01)
    assert 0.01 <= time.monotonic() - began < DEADLINE


def test_one_that_is_killed_in_its_nap_takes_no_wake_with_it(queue, child):
    """A dead napper leaves its bit and its futex set: the frame still finds the one that lives."""
    q = queue(4096)
    done = FORK.SimpleQueue()
    dead = child(q.get)
    until(lambda: q.stats().empty_waits >= 1 and asleep(dead.pid), "the first")
    child(lambda: done.put(q.get(timeout=DEADLINE)))
    until(lambda: q.stats().empty_waits >= 2, "the second")
    kill(dead)
    q.put(7)
    assert done.get() == 7


def test_a_signal_handler_runs_during_a_nap(queue, child):
    q = queue(4096)
    told = FORK.SimpleQueue()

    def naps():
        signal.signal(signal.SIGUSR1, lambda *_: told.put("signal"))
        told.put("ready")
        told.put(q.get(timeout=DEADLINE))

    process = child(naps)
    assert told.get() == "ready"
    until(lambda: q.stats().empty_waits >= 1 and asleep(process.pid), "the nap")
    os.kill(process.pid, signal.SIGUSR1)
    assert told.get() == "signal"
    q.put(1)
    assert told.get() == 1


# ---------------------------------------------------------------------------- the lookout


def nap_often(q) -> None:
    """So often that the lookout watches."""
    for _ in range(TRIPS):
        with pytest.raises(Empty):
            q.get(timeout=0.001)
    assert threads("upipe-lookout") == 1


def naps_on(q) -> Thread:
    """A thread that waits on the queue, which sleeps in a nap without end."""
    before, tasks = q.stats().empty_waits, set(os.listdir("/proc/self/task"))
    getting = Thread(q.get)
    until(lambda: q.stats().empty_waits > before, "the wait")
    (thread,) = set(os.listdir("/proc/self/task")) - tasks
    until(lambda: sleeps_in(int(thread), "nap"), "the nap")
    return getting


def holds(q, told) -> None:
    q.take()
    told.set()
    signal.pause()


def test_a_peer_that_ends_ends_the_nap_of_one_that_naps_often(queue, child):
    q = queue(4096, producers=2)
    nap_often(q)
    for number in range(3):  # each time a newcomer, whom the lookout gets to know
        q.put(number)
        told = FORK.Event()
        peer = child(holds, q, told)
        assert told.wait(DEADLINE)
        getting = naps_on(q)
        kill(peer)
        assert getting.result() == number
    assert threads("upipe-lookout") == 1


def test_a_newcomer_that_ends_is_noticed_by_one_that_naps_already(queue, child):
    q = queue(4096, producers=2)
    nap_often(q)
    q.put("first")
    told = FORK.Event()
    peer = child(holds, q, told)
    assert told.wait(DEADLINE)
    getting = naps_on(q)
    q.put("second")
    assert getting.result() == "second"
    getting = naps_on(q)
    later = FORK.Event()
    newcomer = child(lambda: (q.bell(0), later.set(), signal.pause()))
    assert later.wait(DEADLINE)
    kill(newcomer)
    kill(peer)
    assert getting.result() == "first"


def test_a_forked_child_has_a_lookout_of_its_own(queue, child):
    q, back = queue(4096, producers=2), queue(4096)
    nap_often(q)

    def child_naps() -> None:
        before = threads("upipe-lookout")
        nap_often(q)
        back.put(before)
        back.put(q.get(timeout=DEADLINE))

    child(child_naps)
    assert back.get(timeout=DEADLINE) == 0
    q.put("for the child")
    assert back.get(timeout=DEADLINE) == "for the child"
    nap_often(q)  # and the parent's still stands
    told = FORK.Event()
    q.put(1)
    peer = child(holds, q, told)
    assert told.wait(DEADLINE)
    getting = naps_on(q)
    kill(peer)
    assert getting.result() == 1


def test_children_are_forked_while_threads_nap(queue, child):
    """Each is a newcomer and a peer that ends: the threads are busy with their watch while the next one is forked."""
    q = queue(1 << 16)
    q.never_end()
    nap_often(q)
    threads = [Thread(lambda: [q.get(timeout=DEADLINE) for _ in range(20)]) for _ in range(2)]
    for number in range(40):
        end(child(q.put, number))
    assert sorted(number for t in threads for number in t.result()) == list(range(40))
    assert q.stats().empty_waits < 5000  # some 260; nobody was kept busy


def test_a_handle_that_is_closed_leaves_nothing_with_the_lookout(queue):
    for _ in range(3):
        q = queue(4096)
        nap_often(q)
        q.close()
        q.unlink()


def test_without_a_descriptor_for_the_lookout_naps_stay_short(queue, child):
    q = queue(4096, producers=2)
    child(q.bell, 0)
    q.bell(0)
    for _ in range(TRIPS // 4):
        with few_descriptors(0), pytest.raises(Empty):
            q.get(timeout=0.001)
    q.put(1)
    assert q.get() == 1


# ---------------------------------------------------------------------------- lulls


async def test_a_loop_with_something_to_do_has_no_lull():
    assert lull(None) is not None
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: None)
    assert lull(None) is None
    await asyncio.sleep(0)
    timer = loop.call_later(60, lambda: None)
    seconds, quiet = lull(None)
    assert 0 < seconds <= 60 and quiet.fd == loop._selector.fileno()
    assert lull(0.1)[0] == 0.1 and lull(0) is None
    timer.cancel()
    loop.set_debug(True)
    assert lull(None) is None
    loop.set_debug(False)


def test_another_kind_of_loop_has_no_lull():
    uvloop = pytest.importorskip("uvloop")

    async def ask() -> object:
        return lull(None)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(ask()) is None


async def test_in_a_lull_a_frame_comes_without_a_turn_of_the_loop(queue, child):
    q = queue(4096)
    go = FORK.Event()
    child(lambda: (go.wait(), until(lambda: q.stats().empty_waits), q.put(3)))
    turns = 0

    def turn() -> None:
        nonlocal turns
        turns += 1

    go.set()
    asyncio.get_running_loop().call_later(DEADLINE, turn)  # no reason to give up before
    assert await q.aget(DEADLINE) == 3
    assert q.bell(0)._loops == {} and turns == 0  # it never asked the loop to watch


@pytest.fixture(params=["poll", "nap"])
async def lulled(request, queue, child):
    """A queue whose lulls end by poll, or after many frames by the lookout: (queue, the system call it sleeps in)."""
    q = queue(4096, producers=2)  # so that the end of the child's is not the end
    if request.param == "nap":
        await many_trips(q, child)
    return q, request.param


async def many_trips(q, child) -> None:
    """Until its lulls are naps."""
    there, parent = MemQ(4096), os.getpid()

    def echoes() -> None:
        while (before := there.get()) is not None:
            until(lambda: q.stats().empty_waits > before and asleep(parent))
            q.put(before)

    process = child(echoes)
    for number in range(TRIPS * 100):
        before = q.stats().empty_waits
        there.put(before)
        assert await q.aget(DEADLINE) == before
        if number > TRIPS and lull(None)[1].frames == OFTEN:
            break
    there.put(None)
    process.join(DEADLINE)
    there.close()
    there.unlink()
    q.bell(0).drain()  # of who found us awake again already
    await asyncio.sleep(0)


def during(q, how: str, act) -> Thread:
    """Do it in another thread as soon as this one sleeps on the queue."""
    me, before = threading.get_native_id(), q.stats().empty_waits
    return Thread(lambda: (until(lambda: q.stats().empty_waits > before and sleeps_in(me, how), how), act()))


async def test_timers_other_threads_and_other_descriptors_end_a_lull(lulled):
    """Nothing else would: the frame never comes."""
    q, how = lulled
    loop = asyncio.get_running_loop()
    here, there = os.pipe()
    called = asyncio.Event()

    def readable() -> None:
        os.read(here, 1)
        called.set()

    loop.add_reader(here, readable)
    for act in (lambda: os.write(there, b"x"), lambda: loop.call_soon_threadsafe(called.set)) * 2:
        called.clear()
        thread = during(q, how, act)
        waiting = asyncio.create_task(q.aget())
        async with asyncio.timeout(DEADLINE):
            await called.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        thread.result()
        how = "poll"  # where a lull was ended by something else, the next ones are in poll
    loop.remove_reader(here)
    os.close(here)
    os.close(there)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await q.aget()
    assert q.empty()


async def test_a_signal_that_raises_ends_a_lull(lulled):
    q, how = lulled

    def interrupts(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    usual = signal.signal(signal.SIGUSR1, interrupts)
    try:
        thread = during(q, how, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        with pytest.raises(KeyboardInterrupt):
            Ring.get_or(q, None, DEADLINE, lull(None)[1])
        thread.result()
    finally:
        signal.signal(signal.SIGUSR1, usual)
    q.put(1)
    assert await q.aget() == 1


async def test_a_signal_of_the_loop_ends_a_lull(lulled):
    """Its handler restarts system calls: only the loop's descriptor tells."""
    q, how = lulled
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, told.set)
    thread = during(q, how, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    waiting = asyncio.create_task(q.aget())
    async with asyncio.timeout(DEADLINE):
        await told.wait()
    thread.result()
    waiting.cancel()
    loop.remove_signal_handler(signal.SIGUSR1)


async def test_closing_ends_a_lull(lulled):
    q, how = lulled
    thread = during(q, how, q.close)
    with pytest.raises(QueueClosed):
        await q.aget(DEADLINE)
    thread.result()


def test_the_ring_itself_gives_up_when_the_descriptor_is_readable(queue):
    q = queue(4096)
    here, there = os.pipe()
    os.write(there, b"x")
    quiet = Lull(here)
    assert Ring.get_or(q, "nothing", DEADLINE, quiet) == "nothing"
    assert Ring.receive(q, DEADLINE, quiet) == (False, None)
    q.put(1)
    assert Ring.get_or(q, "nothing", DEADLINE, quiet) == 1
    os.close(here)
    os.close(there)

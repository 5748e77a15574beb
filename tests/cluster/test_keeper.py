"""A pipe on a node: real keepers, real workers, plans fed by hand as a coordinator would."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.cluster.keeper_support import DEADLINE, HERE, SMALL, Held, chain, drained, gone, one
from tests.cluster.test_lanes import seats
from tests.system.support import stat
from upipe.cluster import halts, keeper, keepers, keeping
from upipe.cluster.keeper_line import socket_path
from upipe.cluster.keeping import Follow, Job
from upipe.cluster.lanes import Lane, Layout, lay_out, prune, relay
from upipe.errors import KeeperFailed
from upipe.graph.plan import REPLIES, RESULTS
from upipe.memq import MemQ, segment
from upipe.settings import AutoscalePolicy

pytestmark = [pytest.mark.slow, pytest.mark.system]
MakeHeld = Callable[..., Held]
COUNT = 200


@pytest.fixture
async def held(tmp_path: Path) -> AsyncIterator[MakeHeld]:
    made: list[Held] = []

    def make(*args: Any, **codes: Any) -> Held:
        made.append(Held(tmp_path, *args, **codes))
        return made[-1]

    yield make
    for each in made:
        await each.end()


def numbers():  # type: ignore[no-untyped-def]
    yield from range(COUNT)


def double(value: int) -> int:
    return 2 * value


async def test_a_pipe_on_one_node_from_its_start_to_its_end(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", workers=2), one("c")), a=numbers, b=double, c=double)
    await here.start()
    news = await here.follow()
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    assert news.present and set(news.labels) == {lane.name for lane in here.layout.lanes}
    await here.up()
    await here.until(lambda news: ("a", 0) in news.ended, "a ended")
    ends = ["e0-a-b"]
    await here.follow(ends=frozenset(ends))
    await here.until(lambda news: {("b", 0), ("b", 1)} <= set(news.ended), "b ended")
    ends += ["e1-b-c"]
    await here.follow(ends=frozenset(ends), discards=frozenset({"a", "b"}))
    await here.until(lambda news: ("c", 0) in news.ended, "c ended")
    await here.follow(ends=frozenset([*ends, RESULTS, REPLIES]))
    assert sorted(await drained(results)) == [4 * number for number in range(COUNT)]
    assert here.news.left == () and here.news.failed == "" and here.news.crews["b"].cpu_seconds > 0
    kept = msgspec.json.decode((here.directory / "plan").read_bytes(), type=Follow)  # for tools
    assert (kept.fence, kept.plan) == (here.news.fence, here.plan)
    pid = here.keeper.pid
    await here.stop()
    await until(lambda: segment.process_state(pid) is None)  # reaped
    assert here.lost == [] and here.keeper.last_word() == here.news
    assert not (segment.root() / here.news.session).exists()
    assert not await here.agent().find()
    assert HERE in here.layout.nodes()


# ------------------------------------------------------------------ deaths


def endless():  # type: ignore[no-untyped-def]
    number = 0
    while True:
        yield number
        number += 1


def slow(value: int) -> int:
    time.sleep(0.001)
    return value


async def take(queue: MemQ, count: int) -> list[int]:
    async with asyncio.timeout(DEADLINE):
        return [await queue.aget() for _ in range(count)]


async def running(here: Held, **changes: Any) -> MemQ:
    """Its keeper with a first plan, all up; the results, lossless."""
    await here.start()
    await here.follow(**changes)
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    await here.up()
    return results


async def test_a_worker_that_is_killed_loses_nothing(held: MakeHeld, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    here = held(chain(one("a", "source", resume=True), one("b")), a=until_open(gate), b=slow)
    results = await running(here)
    found = []
    for name in ("b#0", "a#0", "b#0"):
        found += await take(results, 1)
        await here.kill(name)
    crews = here.news.crews
    assert crews["b"].restarts == 2 and crews["a"].restarts == 1
    gate.touch()
    await here.until(lambda news: ("a", 0) in news.ended, "a ended")
    await here.follow(ends=frozenset({"e0-a-b"}))
    await here.until(lambda news: ("b", 0) in news.ended, "b ended")
    await here.follow(ends=frozenset({"e0-a-b", RESULTS, REPLIES}))
    found += await drained(results)
    assert set(found) == set(range(COUNT)) and len(found) <= COUNT + 2 and here.news.failed == ""
    await here.stop()


async def test_the_agent_goes_and_comes_while_data_flows(held: MakeHeld, caplog: pytest.LogCaptureFixture) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    results = await running(here)
    pids = {worker.name: worker.pid for worker in here.news.workers}
    here.keeper.close()
    assert await take(results, 50) == list(range(50))
    before, here.keeper = here.keeper, here.agent()
    assert await here.keeper.find() and await here.keeper.find()
    await here.until(lambda news: news.fence == here.made().fence or len(here.said) > 1, "told everything")
    assert {worker.name: worker.pid for worker in here.news.workers} == pids and here.keeper.pid == before.pid
    assert await take(results, 10) == list(range(50, 60)) and here.lost == []
    with caplog.at_level(logging.WARNING):
        here.keeper.follow((0, 7), None)
        await until(lambda: "a plan of fence (0, 7) was refused" in caplog.text)
    assert here.news.present
    await here.stop()
    assert here.lost == []


async def until(condition: Callable[[], object], seconds: float = DEADLINE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, condition
        await asyncio.sleep(0.01)


AGENT = """
import asyncio, msgspec, sys
from pathlib import Path
from upipe.cluster import keeping
from upipe.cluster.keepers import Keeper
from upipe.cluster.layout import NodePlan
from upipe.memq.queue import MemQ

rings = []

def heard(news):
    if news.up and news.labels and not rings:  # without a plan yet, all of nothing is up
        rings.extend(map(MemQ.attach, news.labels.values()))
        for ring in rings:
            ring.is_boundary(0)  # takes a place among its participants, as a mirror does
        print("up", flush=True)

async def main():
    directory, plan = Path(sys.argv[1]), msgspec.json.decode(Path(sys.argv[2]).read_bytes(), type=NodePlan)
    keeper = Keeper(directory, heard, print)
    await keeper.start(keeping.decode_job(Path(sys.argv[3]).read_bytes()))
    keeper.follow(plan.fence, plan)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_kill_9_of_the_agent_that_started_it(held: MakeHeld, tmp_path: Path) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    plan = here.made()
    (tmp_path / "plan").write_bytes(msgspec.json.encode(plan))
    (tmp_path / "job").write_bytes(keeping.encode_file(Job("test-1", here.spec, here.code, {})))
    command = [sys.executable, "-c", AGENT, str(here.directory), str(tmp_path / "plan"), str(tmp_path / "job")]
    with subprocess.Popen(  # noqa: ASYNC220
        command, stdout=subprocess.PIPE, start_new_session=True
    ) as agent:
        assert agent.stdout is not None and agent.stdout.readline() == b"up\n"
        os.killpg(agent.pid, signal.SIGKILL)
    assert await here.keeper.find()
    await here.until(lambda news: news.up and news.fence == plan.fence, "told everything")
    results = here.queue(here.named(RESULTS))
    await until(lambda: agent.pid not in [pid for pid, _ in results.peers()])
    results.set_policy(0)
    assert len(await take(results, 20)) == 20
    await here.stop()
    assert here.lost == []


async def test_a_lost_keeper_is_told_although_what_it_left_cannot_be_swept(
    held: MakeHeld, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)

    def full(*_: object) -> None:
        raise OSError("out of descriptors")

    with monkeypatch.context() as patch:
        patch.setattr(segment, "sweep", full)
        here.keeper.kill()
        await until(lambda: here.lost)
    assert "signal 9" in here.lost[0]
    segment.sweep()


async def test_kill_9_of_the_keeper_leaves_nothing(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", workers=2)), a=endless, b=slow)
    await running(here)
    session = segment.root() / here.news.session
    assert session.exists()
    here.keeper.kill()
    await until(lambda: here.lost)
    assert "signal 9" in here.lost[0] and not session.exists() and here.keeper.last_word() is None
    for pid in here.pids:
        await gone(pid)
    assert not socket_path(here.directory).exists()
    socket_path(here.directory).touch()  # as when the agent died with it
    assert not await here.agent().find()
    assert not socket_path(here.directory).exists()
    assert await here.keeper.letters() == []
    await here.start()  # another life
    await here.follow()
    await here.stop()


async def test_what_a_keeper_left_that_died_while_no_agent_lived_is_swept_by_the_next(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    session = segment.root() / here.news.session
    here.keeper.close()  # the agent is gone
    os.kill(here.keeper.pid, signal.SIGKILL)
    for pid in here.pids:
        await gone(pid)
    assert session.exists()
    assert not await here.agent().find()
    assert not session.exists()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def test_a_stopped_fork_server_is_replaced_when_a_plan_asks_it_for_workers(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await here.start()
    [server] = children(here.keeper.pid)
    os.kill(server, signal.SIGSTOP)
    await here.follow()
    await here.up()
    assert "the fork server is killed and replaced: it was stopped (SIGSTOP) and answered nothing for" in here.output()
    await here.stop()
    assert here.lost == []


async def test_a_keeper_that_stays_stopped_is_killed_and_counts_as_lost(
    held: MakeHeld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halts, "EVERY", 0.05)
    monkeypatch.setattr(halts, "GRACE", 0.5)
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    os.kill(here.keeper.pid, signal.SIGSTOP)
    await until(lambda: here.lost)
    assert "stopped (SIGSTOP) for 0.5 s and is killed" in here.lost[0]
    for pid in here.pids:
        await gone(pid)


async def test_a_keeper_that_was_stopped_and_goes_on_in_time_is_left_alone(
    held: MakeHeld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(halts, "EVERY", 0.02)
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    os.kill(here.keeper.pid, signal.SIGSTOP)
    await until(lambda: here.keeper._halt._since is not None)  # it was seen
    os.kill(here.keeper.pid, signal.SIGCONT)
    await until(lambda: here.keeper._halt._since is None)
    await here.stop()
    assert here.lost == []


async def test_sigterm_ends_all_and_counts_as_a_loss(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    os.kill(here.keeper.pid, signal.SIGTERM)
    await until(lambda: here.lost)
    assert "exit status 0" in here.lost[0] and here.keeper.last_word() is None
    for pid in here.pids:
        await gone(pid)
    assert not (segment.root() / here.news.session).exists()


# ------------------------------------------------------------------ changing


def tell_who(value: int) -> str:
    return f"{os.getpid()}"


def publish(copy: MemQ, epoch: int, values: list[int]) -> None:
    """As the mirror of a queue on another node."""
    with MemQ(copy.size) as home:
        home.put_many(values)
        home.mirror_source(epoch)
        copy.mirror_sink(epoch)
        view, end, _ = home.outgoing(0, 1 << 20)  # type: ignore[misc]
        assert view is not None
        landing = copy.landing(0, end)
        landing[:] = view
        assert copy.publish(end) == end
        landing.release()
        view.release()


async def test_workers_come_change_leave_and_go_while_it_runs(held: MakeHeld) -> None:
    spec = chain(one("a", workers=2), one("b", workers=2))
    first = lay_out(spec, seats(a="1-", b="1-"), "c")
    here = held(spec, first, a=double, b=tell_who)
    await here.start()
    await here.follow()
    await here.up()
    stays = [here.worker(name) for name in ("a#0", "b#0")]
    # a second a on node 2 brings a copy to read here; a second b here
    here.layout = second = relay(spec, first, seats(a="12", b="11"))
    news = await here.follow()
    await here.until(lambda news: len(news.workers) == 3 and news.up, "b#1 runs")
    copies = [name for name in second.lanes if (name.home, name.reader) == ("2", "1")]
    (copy,) = [lane.name for lane in copies if lane.stream == "e0-a-b"]
    assert copy not in here.said[0].labels and copy in news.labels
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    ring = here.queue(copy)
    publish(ring, 1, list(range(50)))
    seen = set(await take(results, 50))
    await until(lambda: ring.settled()[0] == ring.head)
    assert seen <= {str(here.worker("b#0")), str(here.worker("b#1"))}
    # b#1 leaves for node 2, where a#0 can reach it from then on
    await here.follow(leaving=("b#1",))
    await here.until(lambda news: news.left == (("b", 1),), "b#1 left")
    assert here.news.ended == ()
    here.layout = third = relay(spec, second, seats(a="12", b="12"))
    await here.follow()
    await here.until(lambda news: [worker.name for worker in news.workers] == ["a#0", "b#0"], "b#1 is gone")
    out = [lane for lane in third.lanes if lane.stream == "e0-a-b" and lane.home == "1"]
    assert [here.worker(name) for name in ("a#0", "b#0")] == stays and len(out) == 2
    # node 2 is lost: what it held in common with us is promoted, and its workers come here
    here.layout = relay(spec, third, seats(a="11", b="11"), ["2"])
    await here.follow()
    await here.until(lambda news: len(news.workers) == 4 and news.up, "all are here")
    ring.set_policy(0)
    assert not ring.stream_closed  # the HOLD of the promoted copy
    # a#1 and b#1 are taken away, and come back at once
    here.layout = relay(spec, here.layout, seats(a="1-", b="1-"))
    await here.follow()
    here.layout = relay(spec, here.layout, seats(a="11", b="11"))
    await here.follow()
    await here.until(lambda news: len(news.workers) == 4 and news.up, "they are back")
    assert [here.worker(name) for name in ("a#0", "b#0")] == stays and here.news.failed == ""
    assert here.news.crews["a"].restarts == here.news.crews["b"].restarts == 0
    await here.stop()


async def test_a_copy_that_comes_again_is_a_fresh_one(held: MakeHeld) -> None:
    spec = chain(one("a"), one("b"))
    first = lay_out(spec, seats(a="2", b="1"), "c")
    here = held(spec, first, a=double, b=tell_who)
    await here.start()
    await here.follow()
    await here.up()
    (name,) = [lane.name for lane in first.lanes if lane.stream == "e0-a-b"]
    before, old = here.news.labels[name], here.queue(name)
    here.layout = relay(spec, relay(spec, first, seats(a="2", b="3")), seats(a="2", b="1"))
    await here.follow()
    assert here.news.labels[name] != before
    fresh = here.queue(name)
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    publish(fresh, 3, [1, 2, 3])
    assert len(await take(results, 3)) == 3 and old.head == 0
    await here.stop()


async def test_draining_ends_what_drives_itself(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    results = await running(here)
    await take(results, 5)
    await here.follow(draining=True)
    results.set_policy(3)
    await here.until(lambda news: news.ended == (("a", 0),), "a ended")
    assert here.news.left == ()
    await here.stop()
    again = held(here.spec, a=endless, b=slow)  # begun on another node when it drains already
    again.directory = again.directory.with_name("test-2")
    again.keeper = again.agent()
    await again.start()
    await again.follow(draining=True)
    await again.until(lambda news: news.ended == (("a", 0),) and news.up, "a ended")
    assert [worker.name for worker in again.news.workers if worker.pid] == ["b#0"]
    await again.stop()


# ------------------------------------------------------------------ what goes wrong


def broken(value: int) -> int:
    raise ValueError(f"no {value}")


class Unloadable:
    def __reduce__(self) -> Any:
        return (int, ("no number",))


async def test_code_that_fails_the_pipe_is_told_with_its_traceback(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", on_error="fail")), a=endless, b=broken)
    await here.start()
    await here.follow()
    news = await here.until(lambda news: news.failed and not any(one.pid for one in news.workers), "failed")
    assert "ValueError: no 0" in news.failed and "remote traceback of b#0" in news.failed and news.present
    await here.follow()  # a plan that crossed it changes nothing
    assert not any(one.pid for one in here.news.workers)
    await here.stop()
    assert here.lost == []


async def test_code_that_cannot_load(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=Unloadable())
    await here.start()
    await here.follow()
    await here.until(lambda news: "'b' (worker b#0) cannot load its code" in news.failed, "failed")
    await here.stop()


async def test_shared_memory_that_is_short(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b"), size=1 << 36), a=endless, b=slow)
    await here.start()
    await here.follow()
    await here.until(lambda news: "bytes of shared memory available" in news.failed, "failed")
    assert here.news.fence == (0, 0)
    await here.stop()
    assert here.lost == []


async def test_dead_letters_are_counted_and_can_be_read(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", on_error="dead_letter")), a=numbers, b=broken)
    await here.start()
    await here.follow()
    await here.until(lambda news: "b" in news.crews and news.crews["b"].letters == COUNT, "all buried")
    letters = await here.keeper.letters()
    assert len(letters) == COUNT and letters[0].processor == "b" and letters[0].source == "a"
    assert letters[0].error == "no 0" and letters[0].value == 0
    await here.stop()
    assert here.news.crews["b"].letters == COUNT


async def test_a_keeper_that_cannot_start_says_why(held: MakeHeld, monkeypatch: pytest.MonkeyPatch) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    monkeypatch.setenv("UPIPE_SHM", "/proc/nowhere")
    with pytest.raises(KeeperFailed, match=r"cannot create /proc/nowhere"):
        await here.start()
    monkeypatch.undo()
    assert not await here.keeper.find()
    await here.start()
    await here.keeper.start(Job("test-1", here.spec, {}, {}))  # one lives there: it is the one
    assert keeper.main(here.directory) == keeper.IN_USE
    await here.stop()


async def test_whether_one_lives_is_asked_without_an_effect(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    assert not here.keeper._lives()  # there never was one
    here.keeper._remove_socket()
    await running(here)
    assert here.keeper._lives()
    socket = socket_path(here.directory)
    here.keeper._remove_socket()
    assert socket.is_socket()  # of one that lives
    here.keeper.kill()
    await until(lambda: here.lost)
    assert not socket.exists()
    socket.touch()
    assert not here.keeper._lives() and socket.exists()
    assert not await here.agent().find() and not socket.exists()


async def test_a_keeper_that_hangs_is_replaced_by_nothing(held: MakeHeld, monkeypatch: pytest.MonkeyPatch) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    monkeypatch.setattr(keepers, "REACH", 0.2)
    os.kill(here.keeper.pid, signal.SIGSTOP)
    with pytest.raises(KeeperFailed, match="does not answer within"):
        await here.agent().find()
    here.keeper.kill()
    await until(lambda: here.lost)


# ------------------------------------------------------------------ the rest


async def test_an_idle_keeper_sleeps(held: MakeHeld) -> None:
    spec = chain(one("a"), one("b"))
    here = held(spec, lay_out(spec, seats(a="1", b="1"), "c"), a=double, b=double)
    await here.start()
    await here.follow()
    await here.up()

    def switches() -> int:
        lines = Path(f"/proc/{here.keeper.pid}/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)

    for _ in range(30):  # on a busy machine it may have something left to do at first; one that polls never rests
        before = switches()
        await asyncio.sleep(1.0)
        if switches() - before <= 1:
            break
    else:
        raise AssertionError(f"it woke {switches() - before} times within the last of 30 seconds")
    await here.stop()


SCRIPT = """
from helper_module import WORD
from upipe import Processor
me = Processor("b")
print("script", __file__, flush=True)
import asyncio
async def main():
    await me.connect()
    async for value in me:
        await me.emit(f"{WORD} {value}")
asyncio.run(main())
"""


def words():  # type: ignore[no-untyped-def]
    from helper_module import WORD

    for number in range(3):
        yield f"{WORD} {number} {os.getcwd()}"


async def test_scripts_modules_and_directories_are_those_of_the_job(held: MakeHeld, tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "helper_module.py").write_text("WORD = 'hello'\n")
    script = tmp_path / "abcdef"
    script.write_text(SCRIPT)
    here = held(chain(one("a", "source"), one("b", "entry", entry="there/script.py")), a=words, b=script)
    await here.start(sys_path=(str(modules),))
    await here.follow()
    results = here.queue(here.named(RESULTS))
    found = await take(results, 3)
    assert found == [f"hello hello {number} {here.directory}/work" for number in range(3)]
    await until(lambda: f"script {script}" in here.output())
    await here.stop()


class Summing:
    def __init__(self) -> None:
        self.seen: list[int] = []

    def process(self, value: int) -> list[int]:
        self.seen.append(value)
        if value == COUNT - 1:
            return self.seen
        return None  # type: ignore[return-value]

    def checkpoint(self) -> list[int]:
        return list(self.seen)

    def restore(self, state: list[int]) -> None:
        self.seen = state


async def test_checkpoints_hold_within_the_life_of_a_keeper(held: MakeHeld) -> None:
    here = held(chain(one("a", "source", resume=True), one("b", "class", checkpoint_every=7)), a=lazily, b=Summing)
    results = await running(here)
    for _ in range(3):
        await here.kill("b#0")
    assert await take(results, 1) == [list(range(COUNT))]
    await here.stop()


def lazily():  # type: ignore[no-untyped-def]
    for number in range(COUNT):
        time.sleep(0.005)
        yield number


def until_open(gate: Path) -> Callable[[], Any]:
    """As lazily(), but the second half waits for the file: what a test does before, it does while the source runs."""

    def source():  # type: ignore[no-untyped-def]
        for number in range(COUNT):
            while number == COUNT // 2 and not gate.exists():
                time.sleep(0.005)
            time.sleep(0.005)
            yield number

    return source


async def test_autoscaling_uses_the_room_of_its_plan(held: MakeHeld, tmp_path: Path) -> None:
    policy = AutoscalePolicy(up_age=0.05, interval=0.05, down_idle=0.3)
    settings = msgspec.structs.replace(SMALL, autoscale=policy)
    spec = chain(one("a", "source"), one("b", autoscale=3), settings=settings)
    here = held(spec, lay_out(spec, seats(a="1", b="211"), "c"), a=lazily, b=double)  # b#0 is elsewhere
    alone = held(spec, lay_out(spec, seats(a="2", b="211"), "c"), b=double)
    alone.directory = tmp_path / "alone"
    alone.keeper = alone.agent()
    await alone.start()
    await alone.follow()
    assert alone.news.workers == () and alone.news.up
    (lane,) = [lane.name for lane in alone.layout.of("e0-a-b") if lane.reader == HERE]
    publish(alone.queue(lane), 1, [7])
    await alone.until(lambda news: any(worker.pid for worker in news.workers), "one runs for the first frame")
    await alone.stop()
    await here.start()
    await here.follow()
    first = next(news for news in here.said if here.plan is not None and news.fence == here.plan.fence)
    assert not any(worker.name.startswith("b") for worker in first.workers)
    await here.until(lambda news: any(worker.name == "b#1" and worker.pid for worker in news.workers), "b#1 by load")
    await here.until(lambda news: ("a", 0) in news.ended, "a ended")
    assert here.news.ended == (("a", 0),)
    await here.follow(ends=frozenset({"e0-a-b"}))
    await here.until(lambda news: news.ended == (("a", 0), ("b", 1), ("b", 2)), "b ended, the unused room too")
    await here.stop()



async def test_descriptors_that_are_short(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b", workers=40)), a=endless, b=slow)
    await here.start()
    fds = len(os.listdir(f"/proc/{here.keeper.pid}/fd"))
    resource.prlimit(here.keeper.pid, resource.RLIMIT_NOFILE, (fds + 6, fds + 6))
    await here.follow()
    await here.until(lambda news: "file descriptors in use" in news.failed, "failed")
    await here.stop()
    assert here.lost == []


async def test_a_fork_server_that_dies_is_replaced_and_loses_nothing(held: MakeHeld) -> None:
    settings = msgspec.structs.replace(SMALL, start_method="exec")
    here = held(chain(one("a", "source", resume=True), one("b"), settings=settings), a=lazily, b=slow)
    results = await running(here)
    found = await take(results, 5)
    before = here.worker("b#0")
    told = stat(before)
    assert told is not None
    os.kill(told[1], signal.SIGKILL)  # its parent
    await here.until(lambda news: here.worker("b#0") not in (0, before), "b runs again")
    while set(found) != set(range(COUNT)):
        found += await take(results, 1)
    assert len(found) <= COUNT + 1
    await here.stop()


async def test_a_directory_with_a_long_path(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    here.directory = here.directory / ("x" * 100) / ("y" * 100)
    here.keeper = here.agent()
    await here.start()
    assert await here.agent().find() is True
    await here.stop()


async def test_a_stranger_is_not_heard_and_nonsense_ends_a_connection(held: MakeHeld) -> None:
    here = held(chain(one("a", "source"), one("b")), a=endless, b=slow)
    await running(here)
    reader, writer = await asyncio.open_unix_connection(str(here.directory / "keeper.sock"))
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    async with asyncio.timeout(DEADLINE):
        await reader.read()
        assert await reader.read() == b""
    writer.close()
    await until(lambda: "the connection of process" in here.output() or "ended: a message of" in here.output())
    assert (here.directory / "keeper.sock").stat().st_mode & 0o777 == 0o600
    assert here.directory.stat().st_mode & 0o777 == 0o700
    await here.stop()


async def test_a_queue_is_kept_until_a_worker_that_was_told_of_it_has_attached_it(held: MakeHeld) -> None:
    spec = chain(one("a"), one("b"))
    first = lay_out(spec, seats(a="2", b="1"), "c")
    here = held(spec, first, a=double, b=tell_who)
    await here.start()
    first_plan = here.made()
    here.layout = relay(spec, relay(spec, first, seats(a="3", b="1")), seats(a="3", b="1"), ["2"])
    second_plan = here.made()
    here.keeper.follow(first_plan.fence, first_plan)  # b#0 is forked, and told of the queue from node 2
    here.layout = prune_all(here.layout)
    third_plan = here.made()
    here.keeper.follow(second_plan.fence, second_plan)
    here.keeper.follow(third_plan.fence, third_plan)  # which is gone before it can have attached
    here.plan = third_plan
    await here.until(lambda news: news.fence == third_plan.fence and news.up, "up")
    assert here.news.failed == "" and here.news.crews["b"].restarts == 0
    (open_lane,) = [lane.name for lane in here.layout.lanes if lane.stream == "e0-a-b"]
    assert open_lane in here.news.labels
    session = segment.root() / here.news.session
    kept = here.news.labels[open_lane].rpartition("/")[2]
    await until(lambda: [path.name for path in session.glob("p1.e0*")] == [kept])
    results = here.queue(here.named(RESULTS))
    results.set_policy(0)
    publish(here.queue(open_lane), 9, [1, 2])
    assert len(await take(results, 2)) == 2
    await here.stop()


def prune_all(layout: Layout) -> Layout:
    return prune(layout, [lane.name for lane in layout.lanes])


async def test_a_source_resumes_behind_what_it_emitted_into_queues_that_are_gone(
    held: MakeHeld, tmp_path: Path
) -> None:
    spec = chain(one("a", "source", resume=True), one("b"))
    first = lay_out(spec, seats(a="1", b="2"), "c")
    gate = tmp_path / "gate"
    here = held(spec, first, a=until_open(gate))
    await here.start()
    await here.follow()
    await here.up()
    (old,) = [lane.name for lane in first.lanes if lane.stream == "e0-a-b"]
    ring = here.queue(old)
    found = await take(ring, 5)
    ring.finish()
    here.layout = relay(spec, first, seats(a="1", b="3"))  # b moves; its lane is read there now, as the same queue
    away = msgspec.structs.replace(
        here.layout,
        lanes=tuple(
            msgspec.structs.replace(lane, name="e0-a-b-r9") if lane.name == old else lane
            for lane in here.layout.lanes
        ),
    )
    here.layout = msgspec.structs.replace(away, lanes=(*away.lanes, closed(here.layout, old)))
    await here.follow()  # a writes r9 now, the old one drains
    fresh = here.queue("e0-a-b-r9")
    found += await take(fresh, 5)
    found += await drained_now(ring)
    await here.kill("a#0")  # counts both
    found += await take(fresh, 5)
    here.layout = away
    await here.follow()  # the old one is gone
    assert old not in here.news.labels
    await here.kill("a#0")
    gate.touch()
    while len(found) < COUNT:
        found += await take(fresh, 1)
    assert found.sort() is None and found == list(range(COUNT))
    await here.until(lambda news: news.ended == (("a", 0),), "a ended")
    assert fresh.qsize() == 0
    await here.stop()


def closed(layout: Layout, name: str) -> Lane:
    return next(msgspec.structs.replace(lane, open=False) for lane in layout.lanes if lane.name == name)


async def drained_now(ring: MemQ) -> list[int]:
    found = []
    while (value := ring.get_or(None)) is not None:
        found.append(value)
    ring.finish()
    return found


@pytest.mark.chaos
async def test_nothing_is_lost_while_workers_come_go_and_die(held: MakeHeld) -> None:
    dice = random.Random(4)
    spec = chain(one("a", "source", resume=True), one("b", workers=3))
    here = held(spec, lay_out(spec, seats(a="1", b="1--"), ""), a=lazily, b=slow)
    results = await running(here)
    found: list[int] = []

    async def read() -> None:
        async for value in results:
            found.append(value)

    reading = asyncio.create_task(read())
    killed = 0
    until_then = time.monotonic() + 90
    while ("a", 0) not in here.news.ended:
        assert time.monotonic() < until_then, here.news
        what = dice.randrange(4)
        restarts = here.news.crews["a"].restarts
        if what == 0 and restarts > 2:
            what = 3  # each life begins at zero, and is to come further than the one before
        if what < 2:
            names = [one.name for one in here.news.workers if one.pid and (one.name == "a#0") == (what == 0)]
            killed += what
            with suppress(ProcessLookupError, IndexError):  # it ended this instant, or none runs
                os.kill(here.worker(dice.choice(names)), signal.SIGKILL)
        elif what == 2:
            row = "1" + "".join(dice.choice("1-") for _ in range(2))
            killed += 2  # at most: those that are taken away are killed
            here.layout = relay(spec, here.layout, seats(a="1", b=row))
            await here.follow()
        else:
            await here.follow(leaving=tuple(name for name in ("b#1", "b#2") if dice.random() < 0.5))
        await asyncio.sleep(dice.random() * 0.05)
    here.layout = relay(spec, here.layout, seats(a="1", b="111"))
    await here.follow()
    await here.follow(ends=frozenset({"e0-a-b"}))
    await here.until(lambda news: {("b", 0), ("b", 1), ("b", 2)} <= set(news.ended), "b ended")
    await here.follow(ends=frozenset({"e0-a-b", RESULTS, REPLIES}))
    async with asyncio.timeout(DEADLINE):
        await reading
    assert set(found) == set(range(COUNT)) and len(found) <= COUNT + killed
    assert here.news.failed == "" and here.lost == []
    await here.stop()

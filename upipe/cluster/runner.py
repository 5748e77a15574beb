"""Runs a pipe on a cluster, from the process that declared it: `await pipe.start(cluster="auto")`.

    reach      an agent that has proven itself
    shipping   what the nodes need; each content is sent once, to the agent, where it is not there yet
    submit     the agent becomes the pipe's coordinator, or says why the pipe cannot run
    attend     a long poll: orders for this process's own queues, state and books; and back: how its queues are

This process is a node of the pipe that only dials: it owns what it emits (in*) and the copies of what comes to it
(OwnQueues), and its Ferry moves frames from and to the nodes. When it dies, the coordinator ends the pipe: it hears no
poll any more. After kill -9 the queues go at the next sweep.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from upipe.cluster import books, wire
from upipe.cluster.address import Address, parse
from upipe.cluster.attending import Attending, Follow, GiveUp, Poll
from upipe.cluster.dealings import NodeReport, TellClient
from upipe.cluster.ferry import Ferry
from upipe.cluster.layout import cluster_problems
from upipe.cluster.lines import Lines
from upipe.cluster.own_queues import OwnQueues
from upipe.cluster.peers import Peers
from upipe.cluster.reach import Reached, reach
from upipe.cluster.record import ENDED
from upipe.cluster.routes import ATTEND, DRAIN, LETTERS, STOP
from upipe.cluster.submitting import submit
from upipe.errors import ClusterError, NodeRefused, PipeError, PipeFailed, UpipeError
from upipe.graph.plan import REPLIES, RESULTS, Plan
from upipe.graph.spec import PipeSpec
from upipe.lifecycle import PIPE_ENDED
from upipe.memq.queue import MemQ
from upipe.processor import Processor
from upipe.runtime import answers
from upipe.runtime.gathered import Gathered
from upipe.runtime.report import Report
from upipe.runtime.spool import DeadLetter
from upipe.settings import Certificates

END_SECONDS = 10.0
"""Seconds that the cluster has to tell that a pipe which was told to stop has ended."""
LEAVE_SECONDS = 3.0
"""Seconds to tell that this process ends: longer holds up its Ctrl-C, shorter misses a coordinator that is busy."""
AGAIN = 0.5
"""Seconds until a report that could not be delivered is tried again."""
_letters = msgspec.msgpack.Decoder(list[DeadLetter])


class ClusterRunner:
    """One pipe on a cluster; a `Runner` of pipe.py.

    Args:
        spec: the declared pipe, without problems.
        codes: pickled Bundle per processor name.
        processors: as declared, to find what their code needs.
        cluster: "auto" or HOST:PORT.
        certificates: of one's own; see reach().
    """

    def __init__(
        self, spec: PipeSpec, codes: dict[str, bytes], processors: Sequence[Processor], cluster: str,
        certificates: Certificates | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.id = f"{spec.name[:40]}-{secrets.token_hex(4)}"
        self.calls: answers.Calls = {}
        self.up: asyncio.Future[None] | None = None
        self.ended: asyncio.Future[None] | None = None
        self.results = Gathered()
        self._codes = codes
        self._processors = processors
        self._cluster = cluster
        self._certificates = certificates
        self._replies = Gathered()
        self._own = OwnQueues(spec)
        self._plan = self._own.inputs
        self._changed: Callable[[], None] = lambda: None
        self._told = TellClient("starting")
        self._state = "starting"
        self._reasons: tuple[str, ...] = ()
        self._addresses: dict[str, tuple[Address, ...]] = {}
        self._found: dict[str, tuple[Address, ...]] = {}
        """Where the user found the first node: that works from here, whatever it calls itself."""
        self._dead: dict[tuple[str, int, str], DeadLetter] = {}
        self._letters_seen = 0
        self._began, self._seconds = time.monotonic(), 0.0
        self._number = 0
        self._said: NodeReport | None = None
        """The report that was delivered last, without its number."""
        self._news = asyncio.Event()
        """There may be something to report."""
        self._tasks: list[asyncio.Task[None]] = []

    # ------------------------------------------------------------------ starting

    async def start(self) -> None:
        """Submit it; return when every worker is ready. When it raises, nothing is left.

        Raises:
            DeclarationError: it cannot travel, or no node has room, with a reason for each. ClusterError: no agent.
            PipeFailed: it could not start there.
        """
        self.loop = asyncio.get_running_loop()
        self.up, self.ended = self.loop.create_future(), self.loop.create_future()
        self._began = time.monotonic()
        reached = await reach(self._cluster, own=self._certificates)
        info = await submit(reached, self.id, self.spec, self._codes, self._processors)
        self._join(reached, info)
        try:
            await self._wait_until_up()
        except BaseException:
            await self.stop()
            raise

    def _join(self, reached: Reached, info: wire.PipeInfo) -> None:
        me = reached.credentials.identity.id
        self._addresses = dict(reached.addresses)
        self._found = {reached.node: reached.addresses[reached.node][:1]}
        self._peers = Peers(me, reached.secret, reached.credentials, lambda node: self._addresses.get(node, ()))
        self._lines = Lines(me, self._peers.line)
        self._ferry = Ferry(me, self.id, self._lines, self._news.set)
        self._attending = Attending(me, (reached.node, info.coordinator, *info.members))
        self._task(self._attend(), "attend")
        self._task(self._report_changes(), "report")
        self.results.set_policy(1)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = self.loop.create_task(work, name=f"upipe {name} {self.id}")
        task.add_done_callback(self._task_ended)
        self._tasks.append(task)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and self._state not in PIPE_ENDED:
            self.loop.call_exception_handler({"message": f"uPipe: pipe {self.id} failed inside", "exception": error})
            self._end("failed", (f"uPipe failed inside, which is a bug of it: {type(error).__name__}: {error}",))

    async def _wait_until_up(self) -> None:
        assert self.up is not None and self.ended is not None
        limit = self.spec.settings.start_deadline
        await asyncio.wait([self.up, self.ended], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        if self.state in PIPE_ENDED:
            await self.ended
            if self.state == "failed":
                raise PipeFailed(self.spec.name, self.reasons)
        elif not self.up.done():
            why = f"its workers were not ready within {limit:g} s (settings.start_deadline)"
            raise PipeFailed(self.spec.name, (why, *([self._told.waiting] if self._told.waiting else [])))

    # ------------------------------------------------------------------ attending

    async def _attend(self) -> None:
        """Ask until the pipe has ended, and say good-bye when this process ends before."""
        try:
            await self._ask_on()
        except asyncio.CancelledError:
            if self._state not in PIPE_ENDED:
                await self._leave()
            raise

    async def _leave(self) -> None:
        """The loop ends (asyncio.run cancels all tasks, and waits for them) and nobody has stopped the pipe: an
        exception, Ctrl-C, or a program that forgot it. Nobody can await it any more: it is ended now, not when it is
        missed."""
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._ask_for(STOP, 0.0)
        except TimeoutError:
            pass  # our silence tells it
        self._state, self._seconds = "stopped", time.monotonic() - self._began
        self._let_go()
        await self._peers.close()
        self._ended()

    async def _ask_on(self) -> None:
        while self._state not in PIPE_ENDED:
            poll = self._poll()
            try:
                news = await self._ask(poll)
            except ClusterError as error:
                code = error.code if isinstance(error, NodeRefused) else ""
                pause = self._attending.failed(poll.node, code, str(error), self.loop.time())
                if isinstance(pause, GiveUp):
                    self._end("failed", (pause.reason,))
                    break
                await asyncio.sleep(pause)
            else:
                await self._hear(poll.node, news)

    def _poll(self, **options: float) -> Poll:
        self._number += 1
        report = NodeReport(
            self._attending.client, self._number, self._attending.fence, queues=self._ferry.states(),
            input_closed=self._own.input_closed, up=True,
        )  # fmt: skip
        return self._attending.poll(report, **options)

    async def _ask(self, poll: Poll) -> wire.News:
        share = poll.attendance.patience + self._attending.margin
        places = max(1, len(self._addresses.get(poll.node, ())))
        news = await self._peers.call(poll.node, ATTEND, poll.attendance, seconds=share * places, pipe=self.id)
        self._said = _unnumbered(poll)
        return news

    async def _report_changes(self) -> None:
        """Deliver what changed at once, beside the poll that waits."""
        while True:
            await self._news.wait()
            self._news.clear()
            poll = self._poll(patience=0.0)
            if _unnumbered(poll) == self._said:
                continue
            try:
                await self._hear(poll.node, await self._ask(poll))
            except ClusterError:  # the waiting poll finds another coordinator
                await asyncio.sleep(AGAIN)
                self._news.set()

    async def _hear(self, node: str, news: wire.News) -> None:
        for other, places in news.nodes.items():
            self._learn(other, places)
        for command in self._attending.answered(node, news):
            if isinstance(command, Follow):
                self._follow(command.orders)
            else:
                self._tell(command.told)
        letters = sum(crew.letters for crew in self._told.crews.values())
        if letters > self._letters_seen and self._state not in PIPE_ENDED:
            self._letters_seen = letters
            self._task(self._fetch_letters(), "letters")

    def _learn(self, node: str, places: tuple[str, ...]) -> None:
        self._addresses[node] = tuple(dict.fromkeys((*self._found.get(node, ()), *map(parse, places))))

    def _follow(self, orders: wire.Orders) -> None:
        plan = orders.plan
        if plan is None:
            return  # the end is told, too
        try:
            self._ferry.release(plan)
            self._own.follow(plan)
        except (UpipeError, OSError) as error:
            self._end("failed", (f"the submitting process cannot go on: {error}",))
            return
        self._plan = self._own.inputs
        self._changed()
        self._own.leave()
        self.results.rewire(self._own.of(RESULTS))
        self._replies.rewire(self._own.of(REPLIES))
        self._ferry.follow(plan, self._own.labels)
        self._news.set()
        if plan.draining:
            self._drains()

    def _tell(self, told: TellClient) -> None:
        self._told = told
        if told.state in ENDED:
            self._end(told.state, told.reasons)
            return
        if told.up and self._state == "starting":
            self._state = "running"
            if self.up is not None and not self.up.done():
                self.up.set_result(None)
        if told.state == "draining":
            self._drains()

    def _drains(self) -> None:
        """Whoever told it to: nothing more is taken in."""
        if self._state in PIPE_ENDED or (self._state == "draining" and self._own.input_closed):
            return
        if self._state == "running":
            self._state = "draining"
        self._changed()  # emits under way end first
        self.close_input()

    def watch(self, changed: Callable[[], None]) -> None:
        """Call it whenever `plan` is another one, or the pipe drains."""
        self._changed = changed
        if self._state == "draining":
            changed()

    # ------------------------------------------------------------------ ending

    def _end(self, state: str, reasons: tuple[str, ...]) -> None:
        if self._state in PIPE_ENDED:
            return
        self._state, self._reasons = state, reasons
        self._seconds = time.monotonic() - self._began
        if not hasattr(self, "_ferry"):
            self._ended()
        elif self.loop.is_closed():
            self._let_go()
        else:
            self._winding = self.loop.create_task(self._wind_up(), name=f"upipe end {self.id}")

    def _let_go(self) -> None:
        self._ferry.close()
        self._lines.close()
        self.results.close()
        for stream in (self.results, self._replies):
            stream.finish()
        self._own.end()
        if self.state == "failed":
            answers.fail_all(self.calls, PipeFailed(self.spec.name, self.reasons))
        elif self.state == "stopped":
            answers.fail_all(self.calls, PipeError(f"pipe {self.spec.name!r} was stopped before it answered"))

    async def _wind_up(self) -> None:
        try:
            self._let_go()
            if self.report().dead_letters > len(self._dead):
                await self._fetch_letters()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            try:
                await self._peers.close()
            finally:
                self._ended()

    def _ended(self) -> None:
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(None)

    async def stop(self) -> None:
        """End it now. From another loop, once the pipe's own has ended: the cluster ends it when our polls cease."""
        if self.ended is None:
            return
        if self.loop.is_closed():
            self._end("stopped", ())
            return
        if self._state not in PIPE_ENDED and hasattr(self, "_ferry"):
            await self._ask_for(STOP, self.spec.settings.stop_deadline)
            await asyncio.wait([self.ended], timeout=END_SECONDS)
        self._end("stopped", ())
        await self.ended

    async def drain(self, timeout: float) -> bool:
        """Take no more in, finish the rest; False (and stopped) when that took longer than timeout seconds."""
        assert self.ended is not None
        if self._state not in PIPE_ENDED:
            self._drains()
            await self._ask_for(DRAIN, timeout)
        done, _ = await asyncio.wait([self.ended], timeout=timeout)
        if not done:
            await self.stop()
        return self.state == "completed"

    async def _ask_for(self, route: Any, deadline: float) -> None:
        """Of any node that knows the pipe: it passes it on to the coordinator."""
        for node in list(self._attending.nodes):
            try:
                await self._peers.call(node, route, wire.Stopping(deadline), seconds=END_SECONDS, pipe=self.id)
                return
            except ClusterError:
                continue  # when nobody hears it, our silence ends the pipe

    # ------------------------------------------------------------------ what the pipe's ends ask

    @property
    def state(self) -> str:
        """As Pipe.state."""
        return self._state

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed."""
        return self._reasons

    @property
    def plan(self) -> Plan:
        """The queues of the pipe's own input."""
        return self._plan

    @property
    def queues(self) -> dict[str, MemQ]:
        """By name."""
        return self._own.queues

    def close_input(self) -> None:
        """The pipe emits no more. Idempotent."""
        self._own.close_input()
        self._news.set()

    async def answer_calls(self) -> None:
        """Hand replies to the calls that wait for them, until the pipe ends."""
        roots = len({queue.target for queue in self._plan.queues})
        await answers.answer(self.spec.name, self._replies, self.calls, roots, self._sender)

    def _sender(self, queue: str) -> str:
        """The node from which a queue comes."""
        plan = self._own.plan
        return next((one.source for one in plan.mirrors if one.queue == queue), "") if plan else ""

    # ------------------------------------------------------------------ telling

    def report(self) -> Report:
        """As the coordinator told last, or at the end."""
        seconds = self._seconds or time.monotonic() - self._began
        return books.report(self.spec, self._state, seconds, self._told.books, self._told.crews)

    def dead_letters(self) -> list[DeadLetter]:
        """Those that were fetched from the nodes: all of them at the end."""
        return sorted(self._dead.values(), key=lambda letter: (letter.queue, letter.position))

    async def _fetch_letters(self) -> None:
        for node in list(self._addresses):
            try:
                data = b"".join([piece async for piece in self._peers.content(node, LETTERS, pipe=self.id)])
            except ClusterError:
                continue  # it has none of the pipe, or is gone, and what lay there with it
            for letter in _letters.decode(data) if data else []:
                letter = msgspec.structs.replace(letter, allow_pickle=self.spec.settings.allow_pickle is True)
                self._dead[letter.queue, letter.position, letter.worker] = letter


def _unnumbered(poll: Poll) -> NodeReport | None:
    report = poll.attendance.report
    return msgspec.structs.replace(report, number=0) if report is not None else None


__all__ = ["ClusterRunner", "cluster_problems"]

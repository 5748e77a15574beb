"""Processor: one stage of a pipe. Declares it outside, is its ends of the queues inside a worker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

from upipe.errors import EndOfStream, NotInWorker
from upipe.frame import DataFrame
from upipe.memq._ring import Ready
from upipe.runtime.direct import SHORT_CUTS, YIELD_EVERY, later, short_cuts
from upipe.runtime.worker import Worker, current
from upipe.settings import Place, RestartPolicy

Key = Callable[[Any], Hashable] | str | int
OnError = Literal["retry", "dead_letter", "fail"]
EdgePolicy = Literal["block", "drop_oldest", "latest"]


@dataclass(frozen=True)
class Edge:
    """A declared edge; see Processor.add."""

    target: Processor
    size: int | None
    policy: EdgePolicy
    key: Key | None


class Processor:
    """A logical stage; behind it stand `workers` processes, each an exact copy of its code.

    Args:
        name: [A-Za-z][A-Za-z0-9_-]*, unique in its pipe.
        func: a function without parameters that drives itself (plain or async: connect, get, emit); a generator without
            parameters, whose values are emitted; a function of one value (plain, async, generator), mapped over the
            input, whose result is emitted unless it is None; a class with process(value), one instance per worker,
            with setup(), teardown(), checkpoint() and restore(state) if it has them.
        entry: path of a script to run instead, which connects Processor(name).
        interpreter: Python for the entry script; default this one. uPipe must be installed there.
        config: any picklable value: `me.config`, or the keyword parameter `config` of func or of the class.
        workers: processes at the start.
        autoscale: most processes; between `workers` and this the number follows the load.
        on_error: a value whose processing raised is given again up to max_deliveries and then goes to the dead letters
            ("retry"), goes there at once ("dead_letter"), or fails the pipe ("fail").
        max_deliveries: default from the pipe's settings (5).
        restart: when dead workers are replaced; default from the settings.
        resume: for generators that always yield the same: after a death skip what is in the queue already. When the
            host dies on a cluster, the queue is gone too, and it begins anew elsewhere.
        checkpoint_every: frames between two checkpoints of a class that has checkpoint and restore. They are files of
            the host: on a cluster they do not follow a worker that moves to another one.
        allow_pickle: False refuses pickled frames on all its edges; default from the settings.
        frame_timeout: seconds a frame may take, its waits for room downstream not counted. A worker that takes longer
            is killed by the kernel (SIGALRM: the code must leave that signal alone), and the frame is given to another.
        resources: what each worker takes of its node: "cpu" (cores, default 0.1), "memory" (bytes), "gpu", or what
            nodes were started with (`upipe-node --resources fpga=2`). Counted when a cluster places it, never enforced.
        place: which nodes of a cluster it may run on; see Place. On one host both are only checked.
    """

    def __init__(
        self,
        name: str,
        func: Any = None,
        *,
        entry: str | None = None,
        interpreter: str | None = None,
        config: Any = None,
        workers: int = 1,
        autoscale: int | None = None,
        on_error: OnError = "retry",
        max_deliveries: int | None = None,
        restart: RestartPolicy | None = None,
        resume: bool = False,
        checkpoint_every: int = 100,
        allow_pickle: bool | None = None,
        frame_timeout: float | None = None,
        resources: Mapping[str, float] | None = None,
        place: Place | None = None,
    ) -> None:
        self.name = name
        self.func = func
        self.entry = entry
        self.interpreter = interpreter
        self.workers = workers
        self.autoscale = autoscale
        self.on_error = on_error
        self.max_deliveries = max_deliveries
        self.restart = restart
        self.resume = resume
        self.checkpoint_every = checkpoint_every
        self.allow_pickle = allow_pickle
        self.frame_timeout = frame_timeout
        self.resources = dict(resources or {})
        self.place = place or Place()
        self.edges: list[Edge] = []
        self._config = config
        self._worker: Worker | None = None
        self._turns = YIELD_EVERY

    # ------------------------------------------------------------------ declaring

    def add(
        self, target: Processor, *, size: int | None = None, policy: EdgePolicy = "block", key: Key | None = None
    ) -> Processor:
        """Declare an edge from this processor to `target` and return `target`, so that chains read in order.

        Args:
            size: bytes of its ring; default from the pipe's settings (32 MiB).
            policy: what an emit does when it is full: "block", "drop_oldest" or "latest" (dropped frames are counted).
            key: function of a value, field name or index: frames of equal key go to the same worker, in order.
        """
        if not isinstance(target, Processor):
            raise TypeError(
                f"processor {self.name!r} leads to another Processor, not to {target!r}; wrap it: Processor(name, func)"
            )
        self.edges.append(Edge(target, size, policy, key))
        return target

    def __rshift__(self, target: Processor) -> Processor:
        return self.add(target)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the processor's own function here, in this process (a decorated function stays a function)."""
        if self.func is None:
            raise TypeError(f"processor {self.name!r} has no function to call")
        return self.func(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in SHORT_CUTS}
        return {**state, "_worker": None, "edges": []}  # travels as a name, and connects where it arrives

    # ------------------------------------------------------------------ connecting

    async def connect(self) -> Self:
        """Connect to the queues of this worker. Idempotent.

        Raises:
            NotInWorker: this process is no worker of a processor of this name.
        """
        self._join()
        return self

    def _join(self) -> None:
        if self._worker is None:
            self._worker = current(self.name)
            cls = Processor
            self.__dict__.update(short_cuts(self, self._worker, cls.emit, cls.emit_sync, cls.get_sync))

    @property
    def _joined(self) -> Worker:
        if self._worker is None:
            raise NotInWorker(
                f"processor {self.name!r} is not connected; call `await me.connect()` first, inside its worker"
            )
        return self._worker

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.ack()

    @property
    def blocking(self) -> BlockingProcessor:
        """The same ends for plain functions: every call blocks instead of being awaited."""
        return BlockingProcessor(self)

    # ------------------------------------------------------------------ emitting

    def emit(self, value: Any, dtype: int | None = None, *, to: str | None = None) -> Any:
        """Await it: True when the value is in the queue of every edge (or of the one to `to`), False when there was no
        room within the settings' emit_wait (0.1 s).

        Raises:
            EncodeError, FrameTooLarge: the value cannot be sent; nothing was. EndOfStream: this worker drains.
        """
        worker = self._joined
        if worker.try_emit(value, -1 if dtype is None else dtype, to):
            return self._ready(True)
        return worker.aemit(value, -1 if dtype is None else dtype, worker.assignment.emit_wait, to)

    def emit_sync(
        self, value: Any, dtype: int | None = None, *, timeout: float | None = None, to: str | None = None
    ) -> Any:
        """Await it: True when the value is in; waits for room.

        Raises:
            TimeoutError: no room within `timeout` seconds (None waits for ever). Else as emit.
        """
        if self._joined.try_emit(value, -1 if dtype is None else dtype, to):
            return self._ready(True)
        return self._emit_sync(value, dtype, timeout, to)

    async def _emit_sync(self, value: Any, dtype: int | None, timeout: float | None, to: str | None) -> bool:
        if not await self._joined.aemit(value, -1 if dtype is None else dtype, timeout, to):
            raise TimeoutError(f"processor {self.name!r} found no room within {timeout:g} s")
        return True

    def _ready(self, value: Any) -> Any:
        self._turns -= 1
        if self._turns:
            return Ready(value)
        self._turns = YIELD_EVERY
        return later(value)

    # ------------------------------------------------------------------ getting

    def get(self) -> Any:
        """Await it: the next value, or None when there is nothing now. Finishes the frame before.

        Raises:
            EndOfStream: every input ended; ends the worker cleanly when it escapes.
        """
        found, value = self._joined.try_receive()
        return self._ready(value) if found else later(None)

    def get_sync(self, timeout: float | None = None) -> Any:
        """Await it: the next value; waits for one. Finishes the frame before.

        Raises:
            TimeoutError: nothing came within `timeout` seconds (None waits for ever). EndOfStream: every input ended.
        """
        found, value = self._joined.try_receive()
        return self._ready(value) if found else self._joined.areceive(timeout)

    def __aiter__(self) -> Values:
        return Values(self)

    def ack(self) -> None:
        """Finish the frame in hand now, before the next one is asked for."""
        self._joined.ack()

    # ------------------------------------------------------------------ knowing

    @property
    def config(self) -> Any:
        """The value given as `config`."""
        return self._worker.bundle.config if self._worker is not None else self._config

    @property
    def index(self) -> int:
        """Number of this worker, from 0."""
        return self._joined.assignment.index

    @property
    def epoch(self) -> int:
        """Life number of this worker, 1 at first; raised at each restart."""
        return self._joined.assignment.epoch

    @property
    def source(self) -> str:
        """Name of the processor the frame in hand came from; "" when the pipe itself emitted it."""
        inputs = self._joined.inputs
        ring = inputs.held
        return "" if ring is None else inputs.sources[ring]

    @property
    def frame(self) -> DataFrame | None:
        """The frame in hand with its header (position, deliveries, execution, timestamp), None when there is none."""
        ring = self._joined.inputs.held
        position = ring.holding if ring is not None else None
        return None if ring is None or position is None else DataFrame.unpack(ring.raw(position), lazy=True)

    @property
    def emitted(self) -> int:
        """Frames that this worker slot got into its first edge, in all its lives: where a restarted source goes on."""
        edges = self._joined.outputs.edges
        return sum(ring.emitted(edges[0].producer) for ring in edges[0].rings) if edges else 0

    def __repr__(self) -> str:
        return f"<Processor {self.name!r} workers={self.workers}>"


class BlockingProcessor:
    """A connected processor for plain code; see Processor.blocking. `for value in me` ends with the stream."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    def connect(self) -> Self:
        """As Processor.connect."""
        self._processor._join()
        return self

    def emit(self, value: Any, dtype: int | None = None, *, to: str | None = None) -> bool:
        """As Processor.emit."""
        worker = self._processor._joined
        return worker.emit(value, -1 if dtype is None else dtype, worker.assignment.emit_wait, to)

    def emit_sync(
        self, value: Any, dtype: int | None = None, *, timeout: float | None = None, to: str | None = None
    ) -> bool:
        """As Processor.emit_sync."""
        if not self._processor._joined.emit(value, -1 if dtype is None else dtype, timeout, to):
            raise TimeoutError(f"processor {self._processor.name!r} found no room within {timeout:g} s")
        return True

    def get(self) -> Any:
        """As Processor.get."""
        return self._processor._joined.try_receive()[1]

    def get_sync(self, timeout: float | None = None) -> Any:
        """As Processor.get_sync."""
        return self._processor._joined.receive(timeout)

    def ack(self) -> None:
        """As Processor.ack."""
        self._processor.ack()

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                value = self.get_sync()
            except EndOfStream:
                return
            yield value

    def __enter__(self) -> Self:
        return self.connect()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.ack()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # copy and pickle ask before there is a processor
        return getattr(self._processor, name)  # config, index, epoch, source, frame, emitted, name


class Values:
    """`async for value in me`: until the stream ends."""

    def __init__(self, processor: Processor) -> None:
        self._get = processor.get_sync

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Any:
        try:
            found = self._get()
        except EndOfStream:
            raise StopAsyncIteration from None
        return found if type(found) is Ready else self._waited(found)

    async def _waited(self, found: Awaitable[Any]) -> Any:
        try:
            return await found
        except EndOfStream:
            raise StopAsyncIteration from None


@overload
def processor(func: Callable[..., Any], /) -> Processor: ...
@overload
def processor(*, name: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Processor]: ...
def processor(func: Callable[..., Any] | None = None, /, *, name: str | None = None, **options: Any) -> Any:
    """Make a Processor of the function or class below it, with its name: `@processor` or `@processor(workers=4)`.

    The options are those of Processor.
    """

    def declare(func: Callable[..., Any]) -> Processor:
        return Processor(name or func.__name__, func, **options)

    return declare(func) if func is not None else declare

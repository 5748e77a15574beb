"""The loops that run a processor's code: a driver, a source, a function mapped over the input. (Classes: stateful.py)

Whatever a mapped function raises is the failure of its frame, sys.exit() and a stray CancelledError included: one bad
value must not end a worker. Only EndOfStream ends it, cleanly.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from upipe.errors import EndOfStream
from upipe.runtime.worker import Worker

Code = Callable[[], None]


def body(worker: Worker) -> Code:
    """The whole run of a worker, for its kind of code; a class is constructed here."""
    func, what = worker.bundle.func, worker.assignment
    extra = {"config": worker.bundle.config} if what.takes_config else {}
    if what.kind == "class":
        from upipe.runtime.stateful import Stateful

        return Stateful(worker, func(**extra)).run
    if what.kind in ("driver", "source"):
        return lambda: drive(worker, func(**extra))
    return lambda: map_function(worker, func, extra)


def run_async(main: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on uvloop."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def drive(worker: Worker, result: Any) -> None:
    """Run what a function without parameters gave: a coroutine, a generator whose values are emitted, or nothing."""
    if inspect.iscoroutine(result):
        run_async(result)
    elif hasattr(result, "__anext__"):
        run_async(_async_source(worker, result))
    elif inspect.isgenerator(result):
        skip = _emitted_before(worker)
        for number, value in enumerate(result):
            if number >= skip:
                worker.emit(value)


async def _async_source(worker: Worker, values: Any) -> None:
    skip, number = _emitted_before(worker), 0
    async for value in values:
        if number >= skip:
            worker.try_emit(value) or await worker.aemit(value)
        number += 1


def _emitted_before(worker: Worker) -> int:
    """With resume: how many values earlier lives of this source got into every edge."""
    if not worker.assignment.resume:
        return 0
    past = worker.assignment.emitted
    return min(
        past.get(edge.target, 0) + sum(int(ring.emitted(edge.producer)) for ring in edge.rings)
        for edge in worker.outputs.edges
    )


def map_function(worker: Worker, func: Any, extra: dict[str, Any]) -> None:
    """Call func on each value and emit what it returns or yields, until the stream ends."""

    def call(value: Any) -> Any:
        return func(value, **extra)

    if is_async(func):
        run_async(map_async(worker, call if extra else func))
    else:
        map_sync(worker, call if extra else func)


def is_async(func: Any) -> bool:
    """Whether calling it gives a coroutine or an async generator; also an object with an async __call__."""
    layers = (func, type(func).__call__ if callable(func) else None)
    return any(inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in layers)


def map_sync(worker: Worker, func: Callable[[Any], Any], done: Code | None = None) -> None:
    """Map a plain function; `done` is called after each frame that is through."""
    while True:
        value = worker.receive()
        try:
            emit_result(worker, func(value))
            worker.through()
        except EndOfStream:
            raise
        except BaseException as error:
            worker.failed(error)
            continue
        if done is not None:
            done()


async def map_async(worker: Worker, func: Callable[[Any], Any], done: Code | None = None) -> None:
    """map_sync() for coroutine functions and async generators: one value at a time, so that it can be finished."""
    while True:
        found, value = worker.try_receive()
        if not found:
            value = await worker.areceive()
        try:
            await emit_awaited(worker, func(value))
            worker.through()
        except EndOfStream:
            raise
        except BaseException as error:
            worker.failed(error)
            continue
        if done is not None:
            done()


def emit_result(worker: Worker, result: Any) -> None:
    """Emit a plain result: nothing for None, each value of a generator, else the value."""
    if result is None:
        return
    if inspect.isgenerator(result):
        worker.yields()
        for one in result:
            worker.emit(one)
    elif inspect.iscoroutine(result) or hasattr(result, "__anext__"):  # of a plain function, such as a lambda
        run_async(emit_awaited(worker, result))
    else:
        worker.emit(result)


async def emit_awaited(worker: Worker, result: Any) -> None:
    """Emit the result of a coroutine function, or each value of an async generator."""
    if hasattr(result, "__anext__"):
        worker.yields()
        async for one in result:
            worker.try_emit(one) or await worker.aemit(one)
        return
    if inspect.iscoroutine(result):
        result = await result
    if inspect.isgenerator(result):
        worker.yields()
        for one in result:
            worker.try_emit(one) or await worker.aemit(one)
    elif result is not None:
        worker.try_emit(result) or await worker.aemit(result)

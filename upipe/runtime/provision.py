"""What a pipe needs on this host before its workers run: the queues, the files with their code, their assignments."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from upipe.errors import UpipeError
from upipe.graph.plan import PIPE, OutputPlan, Plan, QueuePlan, WorkerPlan
from upipe.graph.spec import PipeSpec, ProcessorSpec
from upipe.memq import segment
from upipe.memq.queue import MemQ
from upipe.runtime import entry
from upipe.runtime.messages import Assignment, Spawn


def label(number: int, queue: str) -> str:
    """Name in the session of a queue of pipe `number`."""
    return f"p{number}.{queue}"


def make_queue(queue: QueuePlan, number: int, allow_pickle: bool) -> MemQ:
    """Create one queue.

    Raises:
        OutOfSharedMemory.
    """
    made = MemQ(
        queue.capacity,
        policy=queue.policy,  # type: ignore[arg-type]
        name=label(number, queue.name),
        supervised=True,
        allow_pickle=allow_pickle,
    )
    if queue.source == PIPE:
        made.use_producer(0, 1)
    return made


def pickle_allowed(spec: PipeSpec, queue: QueuePlan) -> bool:
    """Whether the pipe and both ends of a queue take pickled frames."""
    return spec.settings.allow_pickle is not False and all(
        one.allow_pickle for one in spec.processors if one.name in (queue.source, queue.target)
    )


def write_code(spool: Path, data: bytes) -> str:
    """Put a pickled bundle into the spool, once for equal ones; returns the path."""
    path = spool / f"code.{hashlib.sha256(data).hexdigest()}"
    if not path.exists():
        path.write_bytes(data)
    return str(path)


def assignments(spec: PipeSpec, plan: Plan, number: int, spool: Path, files: dict[str, str]) -> dict[str, Assignment]:
    """The assignment of every worker of the plan, by its name; the epoch is filled in at each start."""
    processors = {one.name: one for one in spec.processors}
    sources = {queue.name: queue.source for queue in plan.queues}
    found = {}
    for worker in plan.workers:
        one = processors[worker.processor]
        told = assignment(spec, one, worker, sources, partial(label, number), spool)
        found[told.worker] = msgspec.structs.replace(told, code=files.get(one.name, ""))
    return found


def assignment(
    spec: PipeSpec,
    one: ProcessorSpec,
    worker: WorkerPlan,
    sources: Mapping[str, str],
    labelled: Callable[[str], str],
    spool: Path,
) -> Assignment:
    """The assignment of a worker, without its code and epoch.

    Args:
        sources: processor that emits into each queue.
        labelled: name in the session of a queue.
        spool: in the session of this process.
    """
    return Assignment(
        pipe=spec.name,
        processor=one.name,
        index=worker.index,
        epoch=0,
        workers=one.workers,
        kind=one.kind,
        root=str(segment.root()),
        session=spool.parent.name,
        spool=str(spool),
        code="",
        inputs=tuple(labelled(name) for name in worker.inputs),
        sources=tuple(sources[name] for name in worker.inputs),
        outputs=outputs(worker, labelled),
        replies=labelled(worker.replies),
        reply_producer=worker.reply_producer,
        on_error=one.on_error,
        max_deliveries=one.max_deliveries,
        resume=one.resume,
        checkpoint_every=one.checkpoint_every,
        takes_config=one.takes_config,
        emit_wait=spec.settings.emit_wait,
        sys_path=tuple(sys.path),
        cwd=os.getcwd(),
        frame_timeout=one.frame_timeout,
    )


def outputs(worker: WorkerPlan, labelled: Callable[[str], str]) -> tuple[OutputPlan, ...]:
    """The outputs of a worker, by names in the session."""
    return tuple(
        msgspec.structs.replace(output, queues=tuple(labelled(name) for name in output.queues))
        for output in worker.outputs
    )


def request(worker: str, one: ProcessorSpec) -> Spawn:
    """What the fork server is asked for."""
    return Spawn(worker, entry.command(one.interpreter, one.entry) if one.kind == "entry" else ())


def told(error: BaseException, plan: Plan) -> str:
    """Why the pipe cannot go on, for its user."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return _no_descriptors(plan)
    if isinstance(error, UpipeError | OSError):
        return str(error)
    return f"uPipe failed inside, which is a bug of it: {''.join(traceback.format_exception(error))}"


def _no_descriptors(plan: Plan) -> str:
    """What to do when this process has no file descriptor left."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * len(plan.workers) + 2 * len(plan.queues) + 16
    return (
        f"this process has all {limit} file descriptors in use that it may have, and the pipe takes about {needed}; "
        f"raise the limit (`ulimit -n {limit + needed}`, at most {most} here) or use fewer workers"
    )

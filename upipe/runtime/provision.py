"""What a pipe needs on this host before its workers run: the queues, the files with their code, their assignments."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import sys
import traceback
from pathlib import Path

import msgspec

from upipe.errors import UpipeError
from upipe.graph.plan import PIPE, OutputPlan, Plan, QueuePlan
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
        told = Assignment(
            pipe=spec.name,
            processor=one.name,
            index=worker.index,
            epoch=0,
            workers=one.workers,
            kind=one.kind,
            root=str(segment.root()),
            session=spool.parent.name,
            spool=str(spool),
            code=files.get(one.name, ""),
            inputs=tuple(label(number, name) for name in worker.inputs),
            sources=tuple(sources[name] for name in worker.inputs),
            outputs=tuple(_output(output, number) for output in worker.outputs),
            replies=label(number, worker.replies),
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
        found[told.worker] = told
    return found


def _output(output: OutputPlan, number: int) -> OutputPlan:
    return msgspec.structs.replace(output, queues=tuple(label(number, name) for name in output.queues))


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

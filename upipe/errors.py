"""Every exception of uPipe. Each message says what happened, where, and what to do next.

    UpipeError
    |-- UnsupportedPlatform (ImportError)     this machine cannot run uPipe
    |-- DeclarationError    (ValueError)      you declared something that cannot run; lists every problem
    |-- FrameError                            about one value or one frame
    |   |-- EncodeError     (ValueError)      the value does not fit the DType you asked for
    |   |-- FrameTooLarge   (ValueError)      the frame can never fit this queue
    |   |-- FrameCorrupt                      the bytes changed after they were written (CRC mismatch)
    |   `-- PickleRefused                     pickle is switched off here
    |-- QueueError                            about one queue
    |   |-- QueueClosed     (ValueError)      you closed this handle
    |   |-- EndOfStream     (EOFError)        every producer closed and every frame is finished
    |   |-- QueueNotFound   (FileNotFoundError)  no queue of that name
    |   |-- SegmentInvalid                    the file is no queue of this version (foreign, other layout, truncated)
    |   |-- SegmentRefused  (PermissionError) the file belongs to someone else or is open to others
    |   |-- OutOfSharedMemory (OSError)       /dev/shm cannot hold the queue; nothing was created
    |   |-- TooManyParticipants               all participant slots of the queue are in use
    |   |-- MirrorRefused                     a copy of a queue does not fit what another node sent; carries a code
    |   `-- QueueStuck      (TimeoutError)    another process holds a lock of the queue past the deadline
    |-- PipeError                             about a running pipe
    |   |-- NotInWorker                       Processor.connect() outside a worker
    |   |-- IllegalTransition                 the call does not fit the state of the pipe; carries its history
    |   |-- ProcessorError                    your code raised in a worker; carries the remote traceback
    |   |-- PipeFailed                        the pipe gave up; carries the reasons
    |   `-- CallTimeout     (TimeoutError)    no result for a call before its deadline
    `-- ClusterError                          about a node, or between nodes
        |-- TokenError                        the file of the cluster's secret is missing, damaged or open to others
        |-- CertificateError                  your own certificate, key or CA cannot be used
        |-- NodeCannotServe                   this node must not, or cannot, listen where you asked
        |-- NodeUnreachable (ConnectionError) nobody answers there
        |-- NodeUnproven    (ConnectionError) who answers there is not proven to be of this cluster; no token was sent
        |-- NoAgent         (ConnectionError) no agent of this cluster was found; names everything that was tried
        |-- NodeTimeout     (TimeoutError)    no answer before the deadline; a change may or may not have been made
        |-- NodeAnswerInvalid                 the answer is not what this version understands
        |-- OptionInvalid   (ValueError)      what you wrote for an address, seed, label or resource cannot be read
        |-- MessageInvalid  (ValueError)      a node sent what cannot be read; nothing was changed
        |-- DataDirRefused  (OSError)         the agent's data directory cannot be used; says why
        |-- ArchiveRefused  (ValueError)      a directory cannot be shipped (too large), or an archive is not ours
        |-- KeeperFailed                      the process that runs a pipe on this node does not start, or not answer
        `-- NodeRefused                       the node said no; carries status, code and sentence

A full or empty queue is no error of ours: MemQ raises queue.Full and queue.Empty, processors raise TimeoutError.
"""

from __future__ import annotations


class UpipeError(Exception):
    """Base of everything uPipe raises on purpose."""


class UnsupportedPlatform(UpipeError, ImportError):
    """uPipe runs on 64-bit little-endian Linux (x86-64, aarch64)."""


class DeclarationError(UpipeError, ValueError):
    """The declared pipe cannot run.

    Attributes:
        problems: every problem found, each naming the processor and the remedy.
    """

    def __init__(self, problems: list[str] | tuple[str, ...], where: str = "pipe") -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        self.where = where
        lines = "".join(f"\n  {number}. {text}" for number, text in enumerate(self.problems, 1))
        super().__init__(f"{where} cannot run, {len(self.problems)} problem(s):{lines}")

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...], str]]:
        return (type(self), (self.problems, self.where))


class FrameError(UpipeError):
    """Something about one value or one frame."""


class EncodeError(FrameError, ValueError):
    """The value does not fit the DType that was asked for; nothing was written."""


class FrameTooLarge(FrameError, ValueError):
    """The frame can never fit the queue; nothing was written. Names both sizes in bytes."""


class FrameCorrupt(FrameError):
    """The CRC32 of a frame does not match its bytes; the frame was not delivered."""


class PickleRefused(FrameError):
    """A pickled value met a queue, processor or pipe that refuses pickle."""


class QueueError(UpipeError):
    """Something about one queue."""


class QueueClosed(QueueError, ValueError):
    """This handle was closed by its own side."""


class EndOfStream(QueueError, EOFError):
    """Every producer closed its end and every frame is finished: nothing will ever come."""


class QueueNotFound(QueueError, FileNotFoundError):
    """No queue of that name exists."""


class SegmentInvalid(QueueError):
    """The file is no queue this version can use: foreign, of another layout, or truncated."""


class SegmentRefused(QueueError, PermissionError):
    """The file belongs to another user or is readable by others; it was not opened."""


class OutOfSharedMemory(QueueError, OSError):
    """Shared memory cannot hold the queue. Says the needed and the available bytes."""


class TooManyParticipants(QueueError):
    """All participant slots of the queue are taken by live processes."""


class QueueStuck(QueueError, TimeoutError):
    """A live process holds a lock of the queue past the deadline (stopped or swapped out)."""


class MirrorRefused(QueueError):
    """What a mirror was asked to do does not fit its copy of the queue; nothing was changed.

    Attributes:
        code: one word for machines: stale-epoch, bad-position, malformed ...
    """

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        self.message = message
        super().__init__(message)

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return (type(self), (self.code, self.message))


class PipeError(UpipeError):
    """Something about a pipe at run time."""


class NotInWorker(PipeError):
    """A processor was connected outside a worker of a running pipe."""


class IllegalTransition(PipeError):
    """An event that the current state does not allow; nothing was changed.

    Attributes:
        story: the recent (state, event) history of the machine, oldest first.
    """

    def __init__(self, message: str, story: tuple[tuple[str, str], ...] = ()) -> None:
        self.message = message
        self.story = story
        told = " -> ".join(f"{state} ({event})" for state, event in story)
        super().__init__(message + (f"; history: {told}" if told else ""))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[tuple[str, str], ...]]]:
        return (type(self), (self.message, self.story))


class ProcessorError(PipeError):
    """User code raised in a worker.

    Attributes:
        processor: name of the processor.
        worker: the worker, as "name#index".
        kind: qualified name of the remote exception's class.
        remote_traceback: the remote stack as text.
        node: id of the node where it ran; "" on this host.
    """

    def __init__(
        self, processor: str, worker: str, kind: str, message: str, remote_traceback: str = "", node: str = ""
    ) -> None:
        self.processor = processor
        self.worker = worker
        self.kind = kind
        self.message = message
        self.remote_traceback = remote_traceback
        self.node = node
        where = f"worker {worker} on node {node}" if node else f"worker {worker}"
        text = f"processor {processor!r} ({where}) raised {kind}: {message}"
        told = f"\n--- remote traceback ---\n{remote_traceback.rstrip()}" if remote_traceback else ""
        super().__init__(text + told)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        told = (self.processor, self.worker, self.kind, self.message, self.remote_traceback, self.node)
        return (type(self), told)


class PipeFailed(PipeError):
    """The pipe gave up (a restart limit, an unreadable entry script, on_error="fail").

    Attributes:
        reasons: one sentence per failed processor, with the remote traceback when there is one.
    """

    def __init__(self, pipe: str, reasons: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.reasons = reasons
        super().__init__(f"pipe {pipe!r} failed: " + "; ".join(reasons))

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:
        return (type(self), (self.pipe, self.reasons))


class CallTimeout(PipeError, TimeoutError):
    """No result came back for a call before its deadline; the frame itself goes on."""


class ClusterError(UpipeError):
    """Something about a node, or between nodes."""


class TokenError(ClusterError):
    """The file of the cluster's secret is missing, damaged, not yours, or open to others; it was not used."""


class CertificateError(ClusterError):
    """A certificate, key or CA that was brought along cannot be used."""


class NodeCannotServe(ClusterError):
    """This node must not (open to others without token and TLS) or cannot (port in use) listen there."""


class NodeUnreachable(ClusterError, ConnectionError):
    """Nobody answers at that address."""


class NodeUnproven(ClusterError, ConnectionError):
    """Who answers at that address did not prove to be that node of this cluster. Nothing secret was sent to it."""


class NoAgent(ClusterError, ConnectionError):
    """No agent of this cluster was found. Says what was tried, and what to do."""


class NodeTimeout(ClusterError, TimeoutError):
    """No answer before the deadline. A change that was asked for may or may not have been made."""


class NodeAnswerInvalid(ClusterError):
    """An answer of a proven node that this version does not understand, or that is larger than allowed."""


class NodeRefused(ClusterError):
    """A node said no.

    Attributes:
        where: the node, as it was dialled.
        status: HTTP status.
        code: a word for programs, as "unauthorized" or "stale_epoch".
        sentence: for people: what, where, what to do.
    """

    def __init__(self, where: str, status: int, code: str, sentence: str) -> None:
        self.where = where
        self.status = status
        self.code = code
        self.sentence = sentence
        super().__init__(f"{where} refused ({status} {code}): {sentence}")

    def __reduce__(self) -> tuple[type, tuple[str, int, str, str]]:
        return (type(self), (self.where, self.status, self.code, self.sentence))


class OptionInvalid(ClusterError, ValueError):
    """What was written for an address, a seed, a label or a resource is none; says what it should look like."""


class MessageInvalid(ClusterError, ValueError):
    """A message of another node is malformed or too large; nothing was changed."""


class ArchiveRefused(ClusterError, ValueError):
    """A directory cannot be shipped, or an archive that came holds what none of ours does; nothing was unpacked."""


class DataDirRefused(ClusterError, OSError):
    """The data directory of the agent belongs to someone else, is in use, or holds what cannot be read."""


class KeeperFailed(ClusterError):
    """The keeper, which runs a pipe on this node, does not start or does not answer; says why, and where it wrote."""

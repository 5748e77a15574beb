"""uPipe: pipes of processors over shared-memory queues.

    from upipe import Pipe, Processor, DType, MemQ

The layers, each importing only to the right:

    cli -> cluster -> pipe, processor -> runtime -> graph | memq -> frame -> settings | lifecycle -> errors

Pipe and Processor declare and run; MemQ is the queue on its own; DType and DataFrame are what travels; errors says what
can go wrong and what to do then.
"""

from upipe.errors import (
    CallTimeout,
    DeclarationError,
    EncodeError,
    EndOfStream,
    FrameCorrupt,
    FrameError,
    FrameTooLarge,
    OutOfSharedMemory,
    PickleRefused,
    PipeFailed,
    ProcessorError,
    QueueClosed,
    UpipeError,
)
from upipe.frame import DataFrame, DType, register_type
from upipe.memq import Empty, Full, MemQ, QueueStats
from upipe.pipe import Pipe
from upipe.processor import Processor, processor
from upipe.runtime.report import Report
from upipe.runtime.spool import DeadLetter
from upipe.settings import AutoscalePolicy, Certificates, Place, RestartPolicy, Settings

__version__ = "0.1.0"

__all__ = [
    "AutoscalePolicy",
    "CallTimeout",
    "Certificates",
    "DType",
    "DataFrame",
    "DeadLetter",
    "DeclarationError",
    "Empty",
    "EncodeError",
    "EndOfStream",
    "FrameCorrupt",
    "FrameError",
    "FrameTooLarge",
    "Full",
    "MemQ",
    "OutOfSharedMemory",
    "PickleRefused",
    "Pipe",
    "PipeFailed",
    "Place",
    "Processor",
    "ProcessorError",
    "QueueClosed",
    "QueueStats",
    "Report",
    "RestartPolicy",
    "Settings",
    "UpipeError",
    "processor",
    "register_type",
]

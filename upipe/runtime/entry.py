"""Entry scripts: how an interpreter is made to run one as a worker, and how its end is told from its failure.

The script is its process's __main__, with its own sys.argv and sys.path[0]. Ended well (the last line, sys.exit() or
sys.exit(0)): the frame in hand is finished and the ends are closed, after its threads. Ended by an exception or another
exit status: the frame goes by the processor's on_error, and the worker is run again.
"""

from __future__ import annotations

import atexit
import builtins
import os
import socket
import sys
import types
from collections import deque
from pathlib import Path
from typing import Any

from upipe.runtime import messages
from upipe.runtime.messages import Raised
from upipe.runtime.worker import connected
from upipe.runtime.worker_state import describe

LAST_WRITES, LAST_CHARACTERS = 100, 4000
"""Of a script's standard error: how many writes of how many characters are kept until it connects."""
_BOOT = """\
import os, sys
sys.path += {path!r}
try:
    from upipe.runtime.entry import run_script
except BaseException as error:
    import socket, traceback
    traceback.print_exc()
    socket.socket(fileno=int(os.environ["UPIPE_WORKER_FD"])).send({refusal!r})
    sys.exit(1)
run_script({script!r})
"""
"""Runs in any Python 3; only after the import it is uPipe's own."""


def command(interpreter: str | None, script: str) -> tuple[str, ...]:
    """The command line that runs `script` as a worker.

    An interpreter that cannot import uPipe says so and fails the pipe, instead of being restarted.
    """
    own = interpreter or sys.executable
    path = [] if interpreter else [str(Path(__file__).parents[2])]  # the same Python finds the same uPipe
    refusal = Raised(
        "load", "ModuleNotFoundError", f"{own} cannot import uPipe (its standard error tells why); install it there: "
        f"{own} -m pip install upipe", "", fatal=True,
    )
    return (own, "-c", _BOOT.format(path=path, refusal=messages.encode(refusal), script=script))


class Overheard:
    """Python's standard error, passed on; its last words are kept, to be told if the script ends before it connects."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._words: deque[str] = deque(maxlen=LAST_WRITES)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, and remember while nobody is connected."""
        if connected() is None:
            self._words.append(text[-LAST_CHARACTERS:])
        return int(self._stream.write(text))

    def last_words(self) -> str:
        """What was written last."""
        return "".join(self._words)[-LAST_CHARACTERS:].strip()


def run_script(script: str) -> None:
    """Execute the script as __main__."""
    sys.stderr = overheard = Overheard(sys.stderr)
    module = types.ModuleType("__main__")
    module.__dict__.update(__file__=script, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = module
    sys.argv[:] = [script]
    sys.path.insert(0, str(Path(script).absolute().parent))
    if sys.path[1] == "":
        del sys.path[1]  # what -c puts there
    try:
        exec(compile(Path(script).read_bytes(), script, "exec", dont_inherit=True), module.__dict__)
    except SystemExit as error:
        _end(error, overheard)
        raise
    except BaseException as error:
        _end(error, overheard)
        sys.exit(1)
    _end(None, overheard)


def _end(error: BaseException | None, overheard: Overheard) -> None:
    worker, well = connected(), error is None or (isinstance(error, SystemExit) and error.code in (None, 0))
    if worker is None:
        if error is not None and not well:
            _report(error, overheard.last_words())
    elif well:
        atexit.register(worker.close)  # after the script's own threads, before its process is gone
    else:
        assert error is not None
        worker.ended(error)


def _report(error: BaseException, last_words: str) -> None:
    """It failed before it connected: say why, and its last words. (What sys.exit was given, Python prints itself.)"""
    told = describe(error)
    said = f"{told.traceback}--- its last lines on standard error ---\n{last_words}\n" if last_words else told.traceback
    if not isinstance(error, SystemExit):
        print(told.traceback, file=sys.stderr, end="")
    fd: Any = os.environ.get("UPIPE_WORKER_FD")
    if fd is not None:
        message = Raised("run", told.kind, told.message, said)
        socket.socket(fileno=os.dup(int(fd))).send(messages.encode(message))

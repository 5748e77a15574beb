"""Scripts: functions of __main__ and of modules beside the script, forked and executed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.support import Script

pytestmark = [pytest.mark.system, pytest.mark.slow]

PROGRAM = """
import asyncio, sys, threading
import beside
from upipe import Pipe, Processor, Settings

FACTOR = 3

def here(value):
    return FACTOR * value

class Adder:
    def __init__(self):
        self.sum = 0
    def process(self, value):
        self.sum += value
        return self.sum

async def main(method):
    pipe = Pipe("p", settings=Settings(start_method=method))
    again = Processor("again", beside.Again)
    pipe.chain(Processor("here", here), Processor("beside", beside.plus_one), Processor("adder", Adder), again)
    async with pipe:
        return [await pipe.call(number, timeout=60) for number in range(4)]

if __name__ == "__main__":
    for method in ("fork", "exec"):
        print(asyncio.run(main(method)))
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    print(asyncio.run(main("auto")))  # a second thread runs: executed
"""
BESIDE = """
OFFSET = 1

def plus_one(value):
    return value + OFFSET

class Again:
    def process(self, value):
        return value
"""


def test_functions_of_scripts_and_their_modules(script: Callable[..., Script], tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(BESIDE)
    one = script(PROGRAM, cwd="/")
    assert one.end() == (0, "[1, 5, 12, 22]\n" * 3)
    assert one.leftovers() == []
    assert one.others() == []

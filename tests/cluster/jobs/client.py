"""What a submitting process does with its pipe: on any host, with or without an agent.

    client.py ask              calls and results, then the end; the answer as JSON
    client.py exception|leave|interrupt|kill     ends that way while the pipe runs
"""

import asyncio
import itertools
import json
import os
import signal
import sys
import time

from upipe import Pipe, Place, Processor


def double(value):
    if value == 13:
        raise ValueError("unlucky")
    return 2 * value


class Add:
    def process(self, value):
        return value + 1

    def checkpoint(self):
        return None

    def restore(self, state):
        pass


def endless():
    for number in itertools.count():
        yield number
        time.sleep(0.001)


def on(host):
    return Place(labels=(f"host=h{host}",))


async def ask():
    began = time.monotonic()
    pipe = Pipe("ask")
    first = Processor("double", double, place=on(0), on_error="dead_letter")
    pipe.chain(first, Processor("add", Add, place=on(1), workers=2))
    await pipe.start(cluster="auto")
    seconds = time.monotonic() - began
    answers = await asyncio.gather(*map(pipe.call, range(100)), return_exceptions=True)
    [(number, error)] = [(number, one) for number, one in enumerate(answers) if one != 2 * number + 1]
    report = await pipe.wait_for_completion()
    letters = [[one.processor, one.value] for one in pipe.dead_letters()]
    print(json.dumps({"seconds": seconds, "number": number, "error": str(error), "node": error.node,
                      "balanced": report.balanced, "letters": letters}))  # fmt: skip


async def end(how):
    pipe = Pipe(f"end-{how}")
    pipe.chain(Processor("endless", endless, resume=True, place=on(0)), Processor("add", Add, place=on(1)))
    await pipe.start(cluster="auto")
    print("up", flush=True)
    if how == "exception":
        raise RuntimeError("mine")
    if how == "leave":
        return
    os.kill(os.getpid(), signal.SIGINT if how == "interrupt" else signal.SIGKILL)
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(ask() if sys.argv[1] == "ask" else end(sys.argv[1]))

"""Submitted with the directory it lies in: uses a module beside it, prints in its workers, and makes dead letters."""

import asyncio
import os
import sys
import time

import beside

from upipe import Pipe, Place, Processor


def numbers(*, config):
    number = 0
    while not os.path.exists(config):
        yield number
        number += 1
        time.sleep(0.002)


def work(number):
    if number % 10 == 3:
        print(f"worker prints {number} {beside.WORD}", flush=True)
        raise ValueError(f"no {number} here")
    return number


async def main(until):
    pipe = Pipe("script")
    source = Processor("numbers", numbers, config=until, place=Place(labels=("host=h0",)))
    worker = Processor("work", work, on_error="dead_letter", place=Place(labels=("host=h1",)))
    pipe.chain(source, worker)
    await pipe.start(cluster="auto")
    print("up", flush=True)
    report = await pipe.wait_for_completion()
    print(beside.WORD, report.balanced, report.dead_letters > 0, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
    sys.exit(5)

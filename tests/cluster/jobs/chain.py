"""numbers -> work (spread over all hosts) -> record (a ledger outside uPipe), on the cluster.

    chain.py --count 2000 --rate 400 --source h0 --sink h2 --work 4
    chain.py --until FILE              go on until the file is there; how many there were is then in FILE.count

What travels is [number, life, when]: life is when this run of the source began, `when` when it emitted (ns, of one
clock for all hosts of a test). The ledger has a line of them for each value that arrived, and when it did.
"""

import argparse
import asyncio
import itertools
import json
import os
import time
from pathlib import Path

from upipe import Pipe, Place, Processor


def numbers(*, config):
    life = time.monotonic_ns()
    for number in itertools.count() if config.until else range(config.count):
        if config.until and os.path.exists(config.until):
            Path(f"{config.until}.count").write_text(str(number))
            return
        yield [number, life, time.monotonic_ns()]
        time.sleep(1 / config.rate)


def work(value):
    number, life, when = value
    return [number * 2, life, when]


class Record:
    def setup(self):
        name = f"{os.getpid()}-{time.time_ns()}"
        self.file = os.open(Path(os.environ["UPIPE_TEST_LEDGER"]) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def process(self, value):
        number, life, when = value
        os.write(self.file, b"%d %d %d %d\n" % (number // 2, life, when, time.monotonic_ns()))


def place(label, **more):
    return Place(labels=(f"host={label}",) if label else (), **more)


async def main(arguments):
    pipe = Pipe("chain")
    where = place(arguments.source, apart=arguments.apart)
    pipe.chain(
        Processor("numbers", numbers, config=arguments, resume=True, place=where),
        Processor("work", work, workers=arguments.work, place=Place(how="spread")),
        Processor("record", Record, place=place(arguments.sink)),
    )
    await pipe.start(cluster=arguments.cluster)
    print("up", flush=True)
    report = await pipe.wait_for_completion()
    edges = {f"{one.source}>{one.target}": [one.emitted, one.finished, one.dead, one.dropped] for one in report.edges}
    print(json.dumps({"state": report.state, "balanced": report.balanced, "edges": edges}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster", default="auto")
    parser.add_argument("--until", default="")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=400.0)
    parser.add_argument("--work", type=int, default=6)
    parser.add_argument("--source", default="")
    parser.add_argument("--apart", default=(), type=lambda word: (word,), help="from what the source runs")
    parser.add_argument("--sink", default="")
    asyncio.run(main(parser.parse_args()))

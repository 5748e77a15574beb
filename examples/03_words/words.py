"""Count the words in every Python file that is installed here, with several processes at once.

    reader ──text of a file──▶ counter × n ──its counts──▶ total ──▶ the sum, at the end

The total is kept by a stateful processor: one object that sees every count, and speaks when the stream has ended.
Any worker may be killed on the way (kill -9), and still no file is missed or counted twice: the reader resumes, the
total is restored from its checkpoint, and what a dying counter had sent already is known by its number.
"""

import argparse
import asyncio
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

from upipe import Pipe, Place, Processor
from upipe.cli.render import Progress, show

WORD = re.compile(r"[a-z]+")


def python_files(limit: int) -> list[str]:
    """Every .py file of this Python: its standard library and what is installed in it."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    roots |= {Path(sys.prefix).resolve()}
    return sorted({str(file) for root in roots for file in root.rglob("*.py") if file.is_file()})[:limit]


def reader(*, config: list[str]):
    for number, path in enumerate(config):
        yield [number, Path(path).read_bytes()]  # lists, since tuples are pickled, and a cluster refuses pickles


def counter(record: list) -> list:
    number, text = record
    return [number, count(text)]


def count(text: bytes) -> dict[str, int]:
    return dict(Counter(WORD.findall(text.decode(errors="replace").lower())))


class Total:
    """One instance, in one worker. At the end of the stream it emits the sum."""

    def __init__(self):
        self.seen = set()
        self.words = Counter()

    def process(self, record):
        number, counts = record
        if number not in self.seen:  # twice only from a counter that died after it had emitted
            self.seen.add(number)
            self.words.update(counts)

    def checkpoint(self):
        return self.seen, self.words

    def restore(self, state):
        self.seen, self.words = state

    def teardown(self):
        Processor("total").blocking.connect().emit_sync({"files": len(self.seen), "words": dict(self.words)})


def count_here(files: list[str]) -> Counter[str]:
    """The same without a pipe."""
    words: Counter[str] = Counter()
    for path in files:
        words.update(count(Path(path).read_bytes()))
    return words


async def main(arguments: argparse.Namespace) -> int:
    files = python_files(arguments.limit)
    pipe = Pipe("words")
    pipe.chain(
        Processor("reader", reader, config=files, resume=True),
        Processor("counter", counter, workers=arguments.workers, place=Place(how="spread")),
        Processor("total", Total, checkpoint_every=1000),
    )
    async with pipe, Progress(pipe):
        [total] = [result async for result in pipe.results()]
    report = pipe.report()
    show(report)
    words = Counter(total["words"])
    print(f"\n{words.total():,} words in {total['files']:,} files, {len(words):,} different ones; the most frequent:")
    for word, times in words.most_common(10):
        print(f"  {times:9,}  {word}")
    right = total["files"] == len(files) and report.balanced
    if arguments.check:
        began = time.perf_counter()
        same = words == count_here(files)
        seconds = time.perf_counter() - began
        print(f"check: a single process counts {'the same' if same else 'OTHERWISE'}, in {seconds:.1f} s")
        right = right and same
    return 0 if right else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="processes that count (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=6_000, help="most files to read (default: %(default)s)")
    check = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--check", **check, help="count again in one process and compare (default: yes)")
    sys.exit(asyncio.run(main(parser.parse_args())))

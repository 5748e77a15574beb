"""The ring's protocol, model-checked: ring.pml must hold as it is, and fail as soon as one of its rules is broken.

README.md explains the properties and the bounds. Needs `spin` and a C compiler. Where CI is set a missing tool is a
failure; elsewhere it is a skip that says so. UPIPE_MODEL_DEEP=1 adds larger configurations: minutes, and up to 2.2 GB.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, cast

import pytest

MODEL = Path(__file__).with_name("ring.pml")
MEMORY_MIB = 3000
DEPTH = 5000

STUCK = "invalid end state"
LOOP = "non-progress cycle"
OVERWRITTEN = "assertion violated (user["
LOST = "assertion violated ( !(committed["
FEWER_THAN_DELIVERED = "<=deliveries["
UNBALANCED = "assertion violated (claims["

# name: definitions. Every one is searched exhaustively. PATIENT: producers close only when their frames are finished,
# so that no wake-up of the end of stream hides one that was lost; without it they close at once.
PROVED = {
    "2x1, 1 frame each, 1 kill": "NP=2 NF=1 CAP=2 CRASHES=1",
    "2x1, 2 frames each, 1 kill, late close": "NP=2 NF=2 CAP=3 CRASHES=1 PATIENT",
    "1x2, 2 frames, 1 kill": "NC=2 NF=2 CAP=2 CRASHES=1",
    "1x2, 2 frames, 1 kill, a consumer leaves, late close": "NC=2 NF=2 CAP=2 CRASHES=1 PATIENT LEAVE",
    "2x2, 1 frame each, a consumer leaves, late close": "NP=2 NC=2 NF=1 CAP=2 PATIENT LEAVE",
    "1x2, a consumer leaves, lean chain": "NC=2 NF=2 CAP=2 PATIENT LEAVE LEAN_CHAIN",
    "2x2, a consumer stalls, lean chain": "NP=2 NC=2 NF=1 CAP=2 PATIENT STALL LEAN_CHAIN",
    "1x1, 3 frames, 2 kills": "NF=3 CAP=2 CRASHES=2",
    "1x1, 3 frames, 2 kills, late close": "NF=3 CAP=2 CRASHES=2 PATIENT",
    "1x2, a large and a small frame, 1 kill": "NC=2 NF=2 CAP=2 CRASHES=1 SMALL_FRAMES PATIENT",
    "1x1, a large and two small frames, 2 kills": "NF=3 CAP=2 CRASHES=2 SMALL_FRAMES PATIENT",
    "2x1, frames of 2 and 1 granules with padding": "NP=2 NF=2 CAP=3 LEN0=2 LEN1=1",
    "1x1, frames of 1 and 2 granules with padding, 2 kills": "NF=3 CAP=3 LEN0=1 LEN1=2 CRASHES=2 PATIENT",
    "1x1, the reaper is killed too": "NF=2 CAP=2 CRASHES=2 REAPER_DIES PATIENT",
    "1x1, two reapers": "NF=2 CAP=2 CRASHES=2 REAPERS=2 PATIENT",
    "1x1, dead letters, the reaper is killed too": "NF=2 CAP=2 CRASHES=2 MAX_DELIVERIES=1 REAPER_DIES PATIENT",
    "1x1, 3 frames that jump and hop, 1 kill": "NF=3 CAP=5 CRASHES=1 PATIENT JUMPS",
}

DEEP = {
    "2x1, 2 frames each, 1 kill": "NP=2 NF=2 CAP=3 CRASHES=1",
    "1x2, 3 frames, 1 kill, late close": "NC=2 NF=3 CAP=2 CRASHES=1 PATIENT",
    "1x2, 2 frames, 2 kills, late close": "NC=2 NF=2 CAP=2 CRASHES=2 PATIENT",
    "2x1, frames of 2 and 1 granules, 1 kill": "NP=2 NF=2 CAP=3 LEN0=2 LEN1=1 CRASHES=1",
    "1x2, a large and two small frames, 1 kill": "NC=2 NF=3 CAP=2 CRASHES=1 SMALL_FRAMES PATIENT LEAVE",
    "2x1, a large and a small frame each, 1 kill": "NP=2 NF=2 CAP=2 CRASHES=1 SMALL_FRAMES PATIENT",
    "2x2, 2 frames each, late close": "NP=2 NC=2 NF=2 CAP=3 PATIENT",
    "1x2, 2 frames, 1 kill, a consumer leaves, lean chain": "NC=2 NF=2 CAP=2 CRASHES=1 PATIENT LEAVE LEAN_CHAIN",
    "2x2, a consumer leaves, lean chain": "NP=2 NC=2 NF=1 CAP=2 PATIENT LEAVE LEAN_CHAIN",
    "2x2, 1 frame each, 1 kill, late close": "NP=2 NC=2 NF=1 CAP=2 CRASHES=1 PATIENT",
    "1x2, 3 frames that jump and hop, late close": "NC=2 NF=3 CAP=5 PATIENT JUMPS",
    "2x1, 2 frames each that jump and hop, late close": "NP=2 NF=2 CAP=5 PATIENT JUMPS",
}

# Searched for any cycle at all: without one every run ends, and an end is checked by PROVED.
ENDING = {
    "1x1, 3 frames, 1 kill": "NF=3 CAP=2 CRASHES=1 PATIENT",
    "2x1, 2 frames each": "NP=2 NF=2 CAP=3 PATIENT",
    "1x2, 2 frames, a consumer leaves": "NC=2 NF=2 CAP=2 PATIENT LEAVE",
    "1x2, 1 frame, 1 kill": "NC=2 NF=1 CAP=2 CRASHES=1 PATIENT",
    "1x1, the reaper is killed too": "NF=1 CAP=2 CRASHES=2 REAPER_DIES PATIENT",
}

# broken rule: (definitions that hold with the rule, what the search reports without it)
BROKEN = {
    "RECLAIM_WRITER": ("NP=2 NF=1 CAP=1", OVERWRITTEN),
    "RECLAIM_READER": ("NC=2 NF=1 CAP=1", OVERWRITTEN),
    "BAD_RECHECK": ("NF=2 CAP=2 PATIENT", STUCK),
    "BAD_WAKE_FIRST": ("NF=2 CAP=2 PATIENT", STUCK),
    "BAD_SECOND_LOOK": ("NF=2 CAP=2", STUCK),
    "BAD_END_ORDER": ("NF=2 CAP=2", LOST),
    "NO_CLOSER_WAKE": ("NF=2 CAP=2", STUCK),
    "NO_FINISHER_WAKE": ("NC=2 NF=1 CAP=2", STUCK),
    "NO_REPAIR_NEXT": ("NF=1 CAP=2 CRASHES=1 PATIENT", STUCK),
    "NO_REPAIR_WALK": ("NF=1 CAP=2 CRASHES=1 PATIENT", STUCK),
    "NO_WALK_AFTER_SKIP": ("NF=1 CAP=2 CRASHES=1 PATIENT", STUCK),
    "NO_WAKE_AFTER_SKIP": ("NP=2 NF=1 CAP=1 CRASHES=1 PATIENT", STUCK),
    "BAD_TAKE_ORDER": ("NF=1 CAP=2 CRASHES=1 PATIENT", STUCK),
    "BAD_COUNTERS": ("NF=1 CAP=2 CRASHES=1 PATIENT", UNBALANCED),
    "BAD_RING_FLAGGED": ("NF=1 CAP=2 CRASHES=1 PATIENT", STUCK),
    "BAD_HEAD_CHECK": ("NF=1 CAP=1 CRASHES=1 PATIENT", STUCK),
    "NO_HEAD_CHECK": ("NC=2 NF=2 CAP=2 CRASHES=1 PATIENT", STUCK),
    "NO_FLAG_DOWN": ("NC=2 NF=1 CAP=2 CRASHES=1 PATIENT LEAVE", STUCK),
    "BAD_RING_IF_FOUND": ("NC=2 NF=1 CAP=2 CRASHES=1 PATIENT LEAVE", STUCK),
    "NO_RECOUNT": ("NF=1 CAP=2 CRASHES=2 REAPER_DIES PATIENT", STUCK),
    "BAD_FREE_EARLY": ("NF=1 CAP=2 CRASHES=2 REAPER_DIES PATIENT", STUCK),
    "BAD_COUNT_LAST": ("NF=1 CAP=2 CRASHES=2 REAPER_DIES PATIENT", FEWER_THAN_DELIVERED),
    "NO_WALK_AFTER_DEAD": ("NF=1 CAP=2 CRASHES=1 MAX_DELIVERIES=1 PATIENT", STUCK),
    "NO_RECOVERY_LOCK": ("NF=2 CAP=2 CRASHES=2 REAPERS=2 PATIENT", "assertion violated"),
    "NO_PASS_ON": ("NC=2 NF=1 CAP=2 PATIENT LEAVE", STUCK),
    "NO_CHAIN BAD_LEAVE": ("NP=2 NC=2 NF=1 CAP=2 PATIENT LEAVE", STUCK),
    "BAD_FLAG_LATE BAD_LEAVE": ("NC=2 NF=2 CAP=2 PATIENT LEAVE", STUCK),
    "NO_CHAIN": ("NP=2 NC=2 NF=1 CAP=2 PATIENT STALL", STUCK),
    "BAD_FLAG_LATE": ("NP=2 NC=2 NF=1 CAP=2 PATIENT STALL", STUCK),
    "BAD_WAKE_ONE_PRODUCER": ("NP=2 NF=2 CAP=1 PATIENT GIVE_UP", STUCK),
    "LEN1=3": ("NF=2 CAP=4 LEN0=2", STUCK),
    "BAD_HOP": ("NF=3 CAP=5 CRASHES=1 PATIENT JUMPS", "assertion violated"),
    "NO_HOP_WORD": ("NF=3 CAP=5 CRASHES=1 PATIENT JUMPS", STUCK),
    "BAD_PASS_ON": ("NC=2 NF=1 CAP=2 PATIENT", LOOP),
}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GO_DEEP = bool(os.environ.get("UPIPE_MODEL_DEEP"))
CONFIGURATIONS = PROVED | (DEEP if GO_DEEP else {})
AT_ONCE = 1 if GO_DEEP else 2


class Search(NamedTuple):
    """One run of the model checker."""

    definitions: str
    options: tuple[str, ...] = ()
    optimise: str = "-O0"  # a small search is over before an optimised one is compiled


Reports = dict[Search, "Future[str]"]


def proof(definitions: str) -> Search:
    return Search(definitions, (), "-O1" if re.search("N[PC]=2", definitions) else "-O0")


def with_and_without(rule: str) -> tuple[Search, Search]:
    definitions, symptom = BROKEN[rule]
    options = {LOOP: ("-l",), OVERWRITTEN: ("-E",)}.get(symptom, ())
    return Search(definitions, options), Search(f"{definitions} {rule}", options)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reports]:
    """What pan says of each search that the selected tests need; each runs once, AT_ONCE side by side."""
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        reason = f"the model checker needs {' and '.join(missing)}: apt-get install -y spin gcc"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    needed: dict[Search, None] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == Path(__file__):
            needed.update(dict.fromkeys(cast("tuple[Search, ...]", item.callspec.params["searches"])))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {one: pool.submit(search, one, tmp_path_factory.mktemp("pan")) for one in needed}
        pool.shutdown(cancel_futures=True)


def search(one: Search, where: Path) -> str:
    kind = "-DNP" if "-l" in one.options else "-DSAFETY"
    run(where, ["spin", "-a", *(f"-D{word}" for word in one.definitions.split()), str(MODEL)])
    run(where, ["gcc", one.optimise, "-w", kind, "-DCOLLAPSE", f"-DMEMLIM={MEMORY_MIB}", "-o", "pan", "pan.c"])
    return f"{one}\n" + run(where, ["./pan", f"-m{DEPTH}", *one.options])


def run(where: Path, command: list[str]) -> str:
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def errors(report: str) -> int:
    found = re.search(r"^State-vector .* errors: (\d+)$", report, re.MULTILINE)
    assert found, f"pan did not finish: {report}"
    return int(found[1])


def holds(report: str) -> bool:
    incomplete = ("Search not completed", "max search depth too small", "out of memory", "reached -DMEMLIM")
    return errors(report) == 0 and not any(text in report for text in incomplete)


@pytest.mark.parametrize("searches", [(proof(d),) for d in CONFIGURATIONS.values()], ids=CONFIGURATIONS)
def test_the_protocol_holds(reports: Reports, searches: tuple[Search]) -> None:
    report = reports[searches[0]].result()
    assert holds(report), report


@pytest.mark.parametrize("searches", [(Search(d, ("-l",)),) for d in ENDING.values()], ids=ENDING)
def test_every_run_ends(reports: Reports, searches: tuple[Search]) -> None:
    report = reports[searches[0]].result()
    assert holds(report), report


@pytest.mark.parametrize(("searches", "symptom"), [(with_and_without(r), BROKEN[r][1]) for r in BROKEN], ids=BROKEN)
def test_a_broken_rule_is_found(reports: Reports, searches: tuple[Search, Search], symptom: str) -> None:
    kept, broken = (reports[one].result() for one in searches)
    assert holds(kept), f"the rule is not what makes the difference: {kept}"
    assert errors(broken) > 0, f"nobody would notice: {broken}"
    assert symptom in broken

"""What this machine has: CPUs, memory, graphics processors, shared memory, load; and what the user says it has.

Everything is read from files and one program, below a root that tests give. What cannot be read counts as absent, never
as an error: an agent starts on a machine without cgroups, and says what it found.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath

from upipe.cluster.messages import Gpu, Resources
from upipe.errors import OptionInvalid, UpipeError
from upipe.memq import segment

NVIDIA_DEADLINE = 5.0
"""Seconds for nvidia-smi; with a driver that hangs, the agent starts without GPUs rather than not at all."""
BUILT_IN = frozenset({"cpu", "memory", "gpu", "shared_memory"})
"""Resources that are detected. --resources may correct cpu, memory and gpu, and name others."""

_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]{0,62}[A-Za-z0-9])?")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)([kmgt]?i?)", re.IGNORECASE)
_MOST = 64

Run = Callable[[Sequence[str]], str]
"""Runs a program and returns its output; OSError or subprocess.SubprocessError when it cannot."""


def detect(custom: dict[str, float] | None = None, root: Path = Path("/"), run: Run | None = None) -> Resources:
    """What is here.

    Args:
        custom: of parse_resources(); cpu, memory and gpu in it replace what was detected.
        root: where proc, sys and dev are looked for.
        run: how nvidia-smi is run; None is a subprocess with NVIDIA_DEADLINE.
    """
    told = dict(custom or {})
    cpu = told.pop("cpu", None)
    memory = told.pop("memory", None)
    count = told.pop("gpu", None)
    found = gpus(root, run) if count is None else tuple(Gpu(index) for index in range(int(count)))
    return Resources(
        cpu=cpus(root) if cpu is None else cpu,
        memory=memory_bytes(root) if memory is None else int(memory),
        gpus=found,
        custom=told,
    )


# ---------------------------------------------------------------- CPU and memory


def cpus(root: Path = Path("/")) -> float:
    """CPUs this process may use: its affinity, and not more than the quota of any cgroup around it."""
    quotas = [quota for directory in _cgroups(root, "cpu") if (quota := _quota(directory)) is not None]
    return float(min([len(os.sched_getaffinity(0)), *quotas]))


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of RAM, or the limit of the tightest cgroup around this process."""
    limits = [_meminfo(root)]
    for directory in _cgroups(root, "memory"):
        limits += [_number(directory / "memory.max"), _number(directory / "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None), default=0)  # "no limit" of cgroup v1 is 2^63 - 4096


def free_shared_memory() -> int:
    """Bytes that queues can still take: free in the file system where they lie ($UPIPE_SHM, else below /dev/shm)."""
    try:
        found = os.statvfs(segment.root())
    except (OSError, UpipeError):
        return 0  # doctor and start say why
    return found.f_bavail * found.f_frsize


def load() -> float:
    """Processes that run or want to, averaged over a minute."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's cgroup and of all around it, that may limit `controller` (v2 and v1)."""
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        if ".." in inside.parts:  # a cgroup outside of our namespace; its limits are not to be seen
            inside = PurePosixPath()
        found += [mount / step for step in (inside, *inside.parents)]
    return found


def _quota(directory: Path) -> float | None:
    both = (_read(directory / "cpu.max") or "").split()
    if len(both) == 2:
        quota, period = both
    else:
        quota = (_read(directory / "cpu.cfs_quota_us") or "").strip()
        period = (_read(directory / "cpu.cfs_period_us") or "").strip()
    if not (quota.isdigit() and period.isdigit() and int(period) and int(quota)):
        return None  # "max", "-1", or no such file
    return int(quota) / int(period)


def _meminfo(root: Path) -> int | None:
    found = re.search(r"^MemTotal:\s+(\d+) kB", _read(root / "proc/meminfo") or "", re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# ---------------------------------------------------------------- GPUs


def gpus(root: Path = Path("/"), run: Run | None = None) -> tuple[Gpu, ...]:
    """Graphics processors that can compute: of nvidia-smi, else of NVIDIA's driver, else AMD's of the kernel.

    A display alone (a virtual machine's, an onboard one) is none: a node that promised it would get work that fails.
    """
    if not (root / "proc/driver/nvidia").exists() and run is None and shutil.which("nvidia-smi") is None:
        return _amd(root)
    try:
        output = (run or _run)(["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"])
        return _nvidia_smi(output)
    except (OSError, subprocess.SubprocessError, ValueError):
        return _nvidia_driver(root) or _amd(root)


def _nvidia_smi(output: str) -> tuple[Gpu, ...]:
    found = []
    for line in output.splitlines():
        index, name, memory = (field.strip() for field in line.split(","))
        mib = int(memory) if memory.isdigit() else 0  # "[N/A]" where memory is shared with the CPU
        found.append(Gpu(int(index), name[:256], mib * 2**20))
    return tuple(found[:_MOST])


def _nvidia_driver(root: Path) -> tuple[Gpu, ...]:
    cards = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = [re.search(r"^Model:\s+(.+)$", _read(card) or "", re.MULTILINE) for card in cards]
    return tuple(Gpu(index, name[1].strip()[:256] if name else "NVIDIA") for index, name in enumerate(names[:_MOST]))


def _amd(root: Path) -> tuple[Gpu, ...]:
    """Cards with the kernel's compute interface (/dev/kfd) and memory of their own."""
    if not (root / "dev/kfd").exists():
        return ()
    files = sorted((root / "sys/class/drm").glob("card*/device/mem_info_vram_total"))
    sizes = [_number(file) or 0 for file in files]
    return tuple(Gpu(index, "AMD", size) for index, size in enumerate(sizes[:_MOST]))


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_DEADLINE, check=True)
    return done.stdout


# ---------------------------------------------------------------- what the user says


def parse_labels(texts: Iterable[str]) -> dict[str, str]:
    """Read ``k=v`` of --labels; several may be joined by commas.

    Raises:
        OptionInvalid: names the text and what it should look like.
    """
    labels: dict[str, str] = {}
    for text, key, value in _pairs(texts, "label", "zone=eu-1"):
        if len(value) > 256 or not value.isprintable():
            raise OptionInvalid(f"label {text!r}: the value is to be printable and at most 256 characters")
        labels[key] = value
    return labels


def parse_resources(texts: Iterable[str]) -> dict[str, float]:
    """Read ``name=n`` of --resources; n may have a unit (k, M, G, T, Ki, Mi, Gi, Ti).

    Raises:
        OptionInvalid: names the text and what it should look like.
    """
    resources: dict[str, float] = {}
    for text, key, value in _pairs(texts, "resource", "licence=2"):
        if key == "shared_memory":
            raise OptionInvalid(
                f"resource {text!r}: shared memory is what /dev/shm (or $UPIPE_SHM) has; remount it with another size"
            )
        found = _NUMBER.fullmatch(value)
        if found is None or found[2].lower() not in _UNITS:
            raise OptionInvalid(f"resource {text!r}: {value!r} is no amount; write a number such as 2, 0.5 or 16Gi")
        amount = float(found[1]) * _UNITS[found[2].lower()]
        if key == "gpu" and (amount != math.floor(amount) or amount > _MOST):
            raise OptionInvalid(f"resource {text!r}: a node has 0 to {_MOST} whole GPUs")
        resources[key] = amount
    return resources


def _pairs(texts: Iterable[str], what: str, example: str) -> list[tuple[str, str, str]]:
    pairs: dict[str, tuple[str, str, str]] = {}
    for text in (part.strip() for one in texts for part in one.split(",")):
        if not text:
            continue
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not _KEY.fullmatch(key):
            raise OptionInvalid(
                f"{what} {text!r}: write NAME=VALUE, such as {example}; a name has letters, digits and _ . / -"
            )
        if key in pairs:
            raise OptionInvalid(f"{what} {key!r} is given twice: {pairs[key][0]!r} and {text!r}; keep one")
        pairs[key] = (text, key, value)
    if len(pairs) > _MOST:
        raise OptionInvalid(f"{len(pairs)} {what}s are more than {_MOST}, the most a node can tell")
    return list(pairs.values())


# ---------------------------------------------------------------- files


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None

"""Detection on machines that are drawn as files, and what users write on the command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from upipe.cluster import resources
from upipe.cluster.messages import Gpu
from upipe.errors import OptionInvalid

GIB = 2**30


def draw(root: Path, files: dict[str, str]) -> Path:
    """A machine."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def missing(command: Sequence[str]) -> str:
    raise FileNotFoundError(command[0])


def test_this_machine_has_something() -> None:
    found = resources.detect()
    assert 0 < found.cpu <= (os.cpu_count() or 1)
    assert found.memory > 16 * 2**20
    assert resources.free_shared_memory() > 0
    assert resources.load() >= 0.0


def test_an_empty_machine_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources.detect(root=tmp_path, run=missing)
    assert (found.cpu, found.memory, found.gpus) == (len(os.sched_getaffinity(0)), 0, ())
    monkeypatch.setenv("UPIPE_SHM", str(tmp_path / "nowhere" / "below"))
    assert resources.free_shared_memory() == 0


def test_memory_is_the_tightest_limit_around_us_of_cgroup_v2(tmp_path: Path) -> None:
    root = draw(
        tmp_path,
        {
            "proc/meminfo": "MemTotal:       16777216 kB\nMemFree: 1 kB\n",
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
        },
    )
    assert resources.memory_bytes(root) == 2 * GIB


def test_memory_of_cgroup_v1_without_a_limit_is_the_ram(tmp_path: Path) -> None:
    root = draw(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 1048576 kB\n",
            "proc/self/cgroup": "4:memory:/job\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert resources.memory_bytes(root) == GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "1:cpu,cpuacct:/a",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "25000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            0.25,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/../outside", "sys/fs/cgroup/cpu.max": "10000 100000"}, 0.1),
        ({"proc/self/cgroup": "rubbish\n\n"}, None),
    ],
)
def test_cpus_are_the_affinity_and_the_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    assert resources.cpus(draw(tmp_path, files)) == (expected or len(os.sched_getaffinity(0)))


def test_gpus_of_nvidia_smi(tmp_path: Path) -> None:
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str]) -> str:
        asked.append(command)
        return "0, NVIDIA A100-SXM4-40GB, 40960\n1, NVIDIA GB10, [N/A]\n"

    assert resources.gpus(tmp_path, run) == (
        Gpu(0, "NVIDIA A100-SXM4-40GB", 40 * GIB),
        Gpu(1, "NVIDIA GB10", 0),
    )
    assert asked[0][0] == "nvidia-smi"


@pytest.mark.parametrize(
    "failure", [FileNotFoundError("none"), subprocess.TimeoutExpired("nvidia-smi", 5.0), ValueError("rubbish")]
)
def test_gpus_of_the_driver_when_nvidia_smi_fails(tmp_path: Path, failure: Exception) -> None:
    information = "Model: \t\t Tesla T4\nIRQ:   30\n"
    root = draw(tmp_path, {"proc/driver/nvidia/gpus/0000:00:1e.0/information": information})

    def run(command: Sequence[str]) -> str:
        raise failure

    assert resources.gpus(root, run) == (Gpu(0, "Tesla T4"),)


def test_rubbish_of_nvidia_smi_is_no_gpu(tmp_path: Path) -> None:
    assert resources.gpus(tmp_path, lambda command: "NVIDIA-SMI has failed\n") == ()


def test_amd_needs_the_compute_interface(tmp_path: Path) -> None:
    root = draw(tmp_path, {"sys/class/drm/card1/device/mem_info_vram_total": f"{8 * GIB}\n"})
    assert resources.gpus(root, missing) == ()
    draw(root, {"dev/kfd": ""})
    assert resources.gpus(root, missing) == (Gpu(0, "AMD", 8 * GIB),)


def test_a_display_is_no_gpu(tmp_path: Path) -> None:
    assert resources.gpus(draw(tmp_path, {"dev/dri/card0": "", "dev/dri/renderD128": ""}), missing) == ()


def test_what_the_user_says_wins(tmp_path: Path) -> None:
    told = resources.parse_resources(["cpu=3", "memory=2Gi,gpu=2", "licence=1.5"])
    found = resources.detect(told, tmp_path, missing)
    assert (found.cpu, found.memory, len(found.gpus), found.custom) == (3.0, 2 * GIB, 2, {"licence": 1.5})


def test_labels() -> None:
    assert resources.parse_labels(["zone=eu-1", "disk=ssd, team = video", "", "empty="]) == {
        "zone": "eu-1",
        "disk": "ssd",
        "team": "video",
        "empty": "",
    }


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["zone"], "NAME=VALUE"),
        (["=x"], "NAME=VALUE"),
        (["a b=x"], "NAME=VALUE"),
        (["z=1", "z=2"], "given twice"),
        (["z=\x00"], "printable"),
        (["z=" + "x" * 300], "256"),
        ([f"k{number}=v" for number in range(65)], "more than 64"),
    ],
)
def test_labels_that_are_none(texts: list[str], words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        resources.parse_labels(texts)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("gpu", "NAME=VALUE"),
        ("licence=two", "no amount"),
        ("licence=-1", "no amount"),
        ("licence=nan", "no amount"),
        ("licence=1e400", "no amount"),
        ("licence=2i", "no amount"),
        ("gpu=0.5", "whole GPUs"),
        ("gpu=1000", "whole GPUs"),
        ("shared_memory=1G", "/dev/shm"),
    ],
)
def test_resources_that_are_none(text: str, words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        resources.parse_resources([text])


def test_amounts_have_units() -> None:
    assert resources.parse_resources(["a=1k", "b=1.5Mi", "c=2g"]) == {"a": 1e3, "b": 1.5 * 2**20, "c": 2e9}

"""Archives: equal contents are equal bytes, and nothing that is unpacked leaves its directory."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from upipe.cluster import archive
from upipe.errors import ArchiveRefused


def tree(root: Path) -> Path:
    (root / "sub" / "__pycache__").mkdir(parents=True)
    (root / ".git").mkdir()
    for name in ("a.py", "sub/b.txt", "sub/__pycache__/b.pyc", ".git/config", "sub/c.pyc"):
        (root / name).write_text(name)
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    return root


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_what_is_packed_comes_out_again_without_history_and_caches(tmp_path: Path) -> None:
    archive.unpack(archive.pack(tree(tmp_path / "in")), tmp_path / "out")
    assert names(tmp_path / "out") == {"a.py", "sub/b.txt", "run.sh"}
    assert (tmp_path / "out" / "sub" / "b.txt").read_text() == "sub/b.txt"
    assert os.access(tmp_path / "out" / "run.sh", os.X_OK) and not os.access(tmp_path / "out" / "a.py", os.X_OK)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_equal_contents_are_equal_bytes_whatever_their_dates(tmp_path: Path) -> None:
    first, second = tree(tmp_path / "1"), tree(tmp_path / "2")
    os.utime(second / "a.py", (1, 1))
    (second / "sub" / "__pycache__" / "other.pyc").write_text("x")
    assert archive.pack(first) == archive.pack(second)
    (second / "a.py").write_text("changed")
    assert archive.pack(first) != archive.pack(second)


def test_a_virtual_environment_stays_whatever_its_name(tmp_path: Path) -> None:
    root = tree(tmp_path / "in")
    (root / "env" / "lib").mkdir(parents=True)
    for name in ("pyvenv.cfg", "lib/x.py"):
        (root / "env" / name).write_text("x")
    archive.unpack(archive.pack(root), tmp_path / "out")
    assert names(tmp_path / "out") == {"a.py", "sub/b.txt", "run.sh"}


def test_links_out_of_the_directory_do_not_travel(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    root = tree(tmp_path / "in")
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "a.py")
    archive.unpack(archive.pack(root), tmp_path / "out")
    assert names(tmp_path / "out") == {"a.py", "in", "sub/b.txt", "run.sh"}


def test_what_is_too_large_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArchiveRefused, match=f"^{tmp_path}/in is too large to be shipped.*largest: {tmp_path}/in/"):
        archive.pack(tree(tmp_path / "in"), most=10)
    with pytest.raises(ArchiveRefused, match="is no directory"):
        archive.pack(tmp_path / "nothing")


def made(*entries: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, data)
    return buffer.getvalue()


FILE = stat.S_IFREG | 0o644
BAD = {
    "above": (made(("../x", b"", FILE)), "outside"),
    "deep above": (made(("a/../../x", b"", FILE)), "outside"),
    "absolute": (made(("/tmp/x", b"", FILE)), "outside"),
    "of Windows": (made(("..\\x", b"", FILE)), "outside"),
    "a link": (made(("x", b"/etc/passwd", stat.S_IFLNK | 0o777)), "no plain file"),
    "a device": (made(("x", b"", stat.S_IFCHR | 0o666)), "no plain file"),
    "a file and a directory": (made(("x", b"", FILE), ("x/y", b"", FILE)), "as a file and as a directory"),
    "no archive": (b"PK, or so it says", "no zip archive"),
    "cut": (made(("x", b"1" * 5000, FILE))[:-30], "no zip archive"),
}


@pytest.mark.parametrize(("data", "said"), BAD.values(), ids=BAD.keys())
def test_a_bad_archive_is_refused_and_leaves_nothing(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArchiveRefused, match=said):
        archive.unpack(data, tmp_path / "jobs" / "out")
    assert not list((tmp_path / "jobs").iterdir()) and list(tmp_path.iterdir()) == [tmp_path / "jobs"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchiveRefused, match="twice"):
        archive.unpack(made(("x", b"", FILE), ("x", b"", FILE)), tmp_path / "out")


def test_a_small_archive_of_much_is_refused(tmp_path: Path) -> None:
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x", bytes(1 << 20))
    with pytest.raises(ArchiveRefused, match="more than"):
        archive.unpack(bomb.getvalue(), tmp_path / "out", most=1000)
    liar = bomb.getvalue().replace((1 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    with pytest.raises(ArchiveRefused):
        archive.unpack(liar, tmp_path / "out", most=1000)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OSError, match=r"not empty|exists"):
        archive.unpack(made(("x", b"", FILE)), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "mine"

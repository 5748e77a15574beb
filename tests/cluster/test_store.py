"""Contents are whole, are what their name says, and archives stay where they belong."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.disks import SmallDisk
from upipe.cluster.store import NoRoom, Store
from upipe.errors import ArchiveRefused, NodeRefused


def name(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def pieces(*data: bytes):
    for one in data:
        yield one


async def test_a_content_is_kept_whole_and_read_back(tmp_path):
    store = Store(tmp_path)
    assert await store.put(name(b"onetwo"), pieces(b"one", b"two")) == 6
    assert store.has(name(b"onetwo")) and store.missing([name(b"onetwo"), name(b"x")]) == [name(b"x")]
    assert b"".join(store.read(name(b"onetwo"))) == b"onetwo"
    assert stat.S_IMODE(store.path(name(b"onetwo")).stat().st_mode) == 0o600
    with pytest.raises(NodeRefused) as caught:
        next(store.read(name(b"x")))
    assert caught.value.status == 404


async def test_a_content_with_another_hash_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(NodeRefused) as caught:
        await store.put(name(b"x"), pieces(b"y"))
    assert caught.value.code == "other_content"
    assert not list(store.directory.iterdir())


async def test_one_that_breaks_off_leaves_nothing(tmp_path):
    async def broken():
        yield b"some"
        raise ConnectionResetError

    store = Store(tmp_path)
    with pytest.raises(NodeRefused):
        await store.put(name(b"x"), broken())
    assert not list(store.directory.iterdir())


async def test_the_oldest_go_when_there_is_no_room_but_not_what_a_pipe_needs(tmp_path):
    store = Store(tmp_path, most=10)
    for number, data in enumerate((b"aaaa", b"bbbb")):
        await store.put(name(data), pieces(data))
        os.utime(store.path(name(data)), (number, number))
    store.pin("pipe", [name(b"aaaa")])
    await store.put(name(b"cccc"), pieces(b"cccc"))
    assert store.missing([name(b"aaaa"), name(b"bbbb"), name(b"cccc")]) == [name(b"bbbb")]
    store.pin("other", [name(b"cccc")])
    with pytest.raises(NodeRefused) as caught:
        await store.put(name(b"dddd"), pieces(b"dddd"))
    assert (caught.value.status, caught.value.code) == (507, "no_room")
    store.pin("other", [])
    await store.put(name(b"dddd"), pieces(b"dddd"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk", 1 << 20)
    yield disk
    disk.close()


async def test_a_full_disk_is_named_with_what_is_free_and_what_is_needed(small: SmallDisk) -> None:
    store, data, read = Store(small.path), bytes(1 << 18), []

    async def counted(count: int = 8):
        for _ in range(count):
            read.append(data)
            yield data

    whole = name(data * 8)
    with pytest.raises(NoRoom) as caught:
        await store.put(whole, counted())
    assert caught.value.status == 507 and len(read) == 8
    said = caught.value.sentence
    assert f"cannot be stored in {store.directory}: No space left on device; it takes 2,097,152 bytes, and" in said
    free = int(re.search(r"and ([0-9,]+) are free", said)[1].replace(",", ""))  # type: ignore[index]
    assert 3 << 18 <= free <= 1 << 20 and "make room on that disk" in said
    assert not list(store.directory.iterdir())
    with pytest.raises(NoRoom, match="it takes 2,097,152 bytes"):
        await store.put(whole, counted())
    assert len(read) == 8, "it is not sent in vain again"
    with pytest.raises(NodeRefused, match="other_content"):  # whatever there is room for
        await store.put(name(b"other"), counted())
    assert await store.put(name(data), counted(1)) == len(data)
    small.fill()
    with pytest.raises(NoRoom, match=r"it takes 1 bytes, and 0 are free"):
        await store.put(name(b"x"), pieces(b"x"))
    small.free()
    assert await store.put(name(b"x"), pieces(b"x")) == 1


async def test_modules_that_find_no_room_unpacked_are_told_with_their_size(small: SmallDisk) -> None:
    store, buffer = Store(small.path), io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("large.py", bytes(2 << 20))
    await store.put(name(buffer.getvalue()), pieces(buffer.getvalue()))
    with pytest.raises(NoRoom, match=f"cannot be stored in {store.modules}: .*; it takes 2,097,152 bytes"):
        store.unpack(name(buffer.getvalue()))
    assert not list(store.modules.iterdir())


async def test_what_a_crash_left_and_what_nobody_used_is_removed_at_the_start(tmp_path):
    store = Store(tmp_path)
    await store.put(name(b"old"), pieces(b"old"))
    await store.put(name(b"new"), pieces(b"new"))
    os.utime(store.path(name(b"old")), (1, 1))
    (store.directory / ".half").write_bytes(b"")
    (store.modules / ".half").mkdir()
    Store(tmp_path).tidy()
    assert [path.name for path in store.directory.iterdir()] == [name(b"new")]
    assert not list(store.modules.iterdir())


def archive(*members: tuple[str, bytes], link: str = "") -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as made:
        for path, content in members:
            made.writestr(path, content)
        if link:
            one = zipfile.ZipInfo(link)
            one.external_attr = (stat.S_IFLNK | 0o777) << 16
            made.writestr(one, "/etc/passwd")
    return data.getvalue()


async def put(store: Store, data: bytes) -> str:
    await store.put(name(data), pieces(data))
    return name(data)


async def test_an_archive_is_unpacked_once(tmp_path):
    store = Store(tmp_path)
    sha = await put(store, archive(("a.py", b"A = 1"), ("pack/__init__.py", b""), ("empty/", b"")))
    there = store.unpack(sha)
    assert (there / "a.py").read_bytes() == b"A = 1" and (there / "pack/__init__.py").exists()
    (there / "mark").touch()
    assert store.unpack(sha) == there and (there / "mark").exists()
    assert sorted(path.name for path in store.modules.iterdir()) == [sha]


@pytest.mark.parametrize("path", ["../out", "/out", "a/../../out", "a\\..\\out"])
async def test_an_archive_that_leads_out_is_refused_whole(tmp_path, path):
    store = Store(tmp_path)
    sha = await put(store, archive(("fine.py", b""), (path, b"bad")))
    with pytest.raises(ArchiveRefused):
        store.unpack(sha)
    assert not list(store.modules.iterdir())
    assert not (tmp_path / "out").exists() and not (store.modules / "out").exists()


async def test_links_and_what_is_no_archive_are_refused_whole(tmp_path):
    store = Store(tmp_path)
    for data in (archive(link="link"), b"no archive"):
        sha = await put(store, data)
        with pytest.raises(ArchiveRefused):
            store.unpack(sha)
    assert not list(store.modules.iterdir())


async def test_what_a_pipe_needs_stays_however_long_ago_it_came(tmp_path: Path) -> None:
    """A pipe may run for longer than KEEP_DAYS, and its agent may be started again meanwhile."""
    store = Store(tmp_path)
    for data in (b"runs here", b"recorded here", b"old"):
        await put(store, data)
        os.utime(store.path(name(data)), (1, 1))
    again = Store(tmp_path, most=1)
    again.pin("pipe", [name(b"runs here")])
    again.needed = lambda: [name(b"recorded here")]
    again.tidy()
    assert {path.name for path in again.directory.iterdir()} == {name(b"runs here"), name(b"recorded here")}
    with pytest.raises(NodeRefused, match="leave no room"):
        await put(again, b"more")
    assert {path.name for path in again.directory.iterdir()} == {name(b"runs here"), name(b"recorded here")}

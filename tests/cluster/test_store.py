"""Contents are whole, are what their name says, and archives stay where they belong."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from upipe.cluster.store import Store
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

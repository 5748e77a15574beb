"""The data directory: permissions, lock, identity, durability, rubbish."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from upipe.cluster.node_id import DataDir, default_data_dir
from upipe.errors import DataDirRefused


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_first_start_makes_everything_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "data"
    with DataDir(path) as data:
        identity = data.identity()
    assert len(identity.node_id) == 16
    assert int(identity.node_id, 16) >= 0
    assert identity.life == 1
    assert identity.incarnation == 1 << 32
    assert mode(path) == 0o700
    assert {file.name: mode(file) for file in path.iterdir()} == {"node_id": 0o600, "life": 0o600, "lock": 0o600}


def test_each_start_is_a_new_life_of_the_same_node(tmp_path: Path) -> None:
    identities = []
    for _ in range(3):
        with DataDir(tmp_path / "data") as data:
            identities.append(data.identity())
    assert len({one.node_id for one in identities}) == 1
    assert [one.life for one in identities] == [1, 2, 3]


def test_a_life_that_others_have_seen_is_not_lived_again(tmp_path: Path) -> None:
    with DataDir(tmp_path / "data") as data:
        data.identity()
        data.outlive(7)
        data.outlive(3)
        assert data.identity().life == 8


def test_two_agents_do_not_share_a_directory(tmp_path: Path) -> None:
    with DataDir(tmp_path / "data"), pytest.raises(DataDirRefused, match=rf"another agent \(pid {os.getpid()}\)"):
        DataDir(tmp_path / "data")
    with DataDir(tmp_path / "data") as again:
        again.close()
        again.close()


def test_an_open_directory_is_refused_and_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.mkdir()
    path.chmod(0o755)
    with pytest.raises(DataDirRefused, match="chmod 700"):
        DataDir(path)
    assert mode(path) == 0o755


def test_a_directory_of_someone_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    path.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(DataDirRefused, match="belongs to uid"):
        DataDir(path)


@pytest.mark.parametrize("make", ["file", "link"])
def test_what_is_no_directory_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "data"
    if make == "file":
        path.write_text("")
    else:
        (tmp_path / "real").mkdir(mode=0o700)
        path.symlink_to(tmp_path / "real")
    with pytest.raises(DataDirRefused, match="--data-dir"):
        DataDir(path)


@pytest.mark.parametrize(
    ("name", "text"), [("node_id", "../../etc"), ("node_id", ""), ("life", "-1"), ("life", "9" * 30)]
)
def test_rubbish_is_refused_with_what_to_do(tmp_path: Path, name: str, text: str) -> None:
    with DataDir(tmp_path / "data") as data:
        data.identity()
        (data.path / name).write_text(text)
        with pytest.raises(DataDirRefused, match="remove it"):
            data.identity()


def test_a_crash_between_write_and_rename_leaves_the_old_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DataDir(tmp_path / "data") as data:
        data.identity()
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(DataDirRefused, match="No space left"):
                data.identity()
        assert (data.path / "life").read_text() == "1\n"
        assert data.identity().life == 2


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    with DataDir(tmp_path / "data") as data:
        (data.path / "node_id").symlink_to(target)
        with pytest.raises(DataDirRefused):
            data.identity()
    assert target.read_text() == "precious"


def test_the_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/upipe")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert default_data_dir() == Path("/somewhere/upipe/node")

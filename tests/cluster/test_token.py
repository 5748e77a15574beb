"""The secret's file is refused unless it is whole and only ours, and nothing but that file ever tells the secret."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path

import pytest

from upipe.cluster import token
from upipe.cluster.token import Secret
from upipe.errors import TokenError

SECRET = Secret(bytes(range(32)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "here" / "token"


def test_a_created_token_is_read_back_from_a_file_and_directories_of_our_own(path: Path) -> None:
    made = token.create(path)
    assert token.load(path) == made
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == stat.S_IMODE(path.parent.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["token"]


def test_a_second_one_needs_force(path: Path) -> None:
    first = token.create(path)
    with pytest.raises(TokenError, match="--force"):
        token.create(path)
    assert token.load(path) == first
    assert token.create(path, force=True) == token.load(path) != first
    assert os.listdir(path.parent) == ["token"]


def test_where_it_is_looked_for() -> None:
    assert token.place({"HOME": "/home/me"}) == Path("/home/me/.config/upipe/token")
    assert token.place({"HOME": "/home/me", token.VARIABLE: "/run/t"}) == Path("/run/t")
    assert token.without_token({token.VARIABLE: "/run/t", "PATH": "/bin"}) == {"PATH": "/bin"}


def test_no_file_says_how_to_make_one(path: Path) -> None:
    with pytest.raises(TokenError, match=rf"{path}.*upipe token create"):
        token.load(path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o610])
def test_open_to_others_is_refused(path: Path, mode: int) -> None:
    token.create(path)
    path.chmod(mode)
    with pytest.raises(TokenError, match=f"open to others \\(mode {mode:04o}\\).*chmod 600"):
        token.load(path)


def test_the_file_of_someone_else_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token.create(path)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(TokenError, match="belongs to user"):
        token.load(path)


def test_a_symbolic_link_is_not_followed(path: Path, tmp_path: Path) -> None:
    token.create(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(TokenError, match="symbolic link"):
        token.load(link)


def test_a_fifo_or_directory_is_refused_and_hangs_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo", 0o600)
    for one in (tmp_path / "fifo", tmp_path):
        with pytest.raises(TokenError, match="no regular file"):
            token.load(one)


TEXT = SECRET.text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no token of uPipe"),
        ("hunter2", "no token of uPipe"),
        (TEXT.replace("-1.", "-2."), "another format"),
        (TEXT[:-1], "damaged"),
        (TEXT[:-12], "damaged"),
        (TEXT.replace(".AAEC", ".BBEC"), "damaged"),
        (TEXT + "0", "damaged"),
        (TEXT.replace("AAEC", "Ä€EC"), "damaged"),
        ("upipe-token-1", "damaged"),
    ],
)
def test_what_is_no_token_is_refused_and_not_quoted(text: str, said: str) -> None:
    with pytest.raises(TokenError, match=said) as raised:
        token.parse(text, "the file")
    assert "the file" in str(raised.value)
    assert text == "" or text not in str(raised.value)


def test_white_space_around_it_does_no_harm() -> None:
    assert token.parse(f"\n {TEXT} \n", "x") == SECRET


def test_what_is_derived_is_fixed_for_ever() -> None:
    """Hosts of different versions of uPipe must agree: a change here is a new token format."""
    assert SECRET.bearer == SECRET.bearer
    assert SECRET.fingerprint == "3aea4f70a4c4493c"
    assert SECRET.bearer == "XBEkO2sz_rMkErCiIKTJhReFO7UwxfXOOdylF-_gzag"
    assert SECRET.derive("a") != SECRET.derive("b")


def test_the_secret_shows_nowhere() -> None:
    shown = f"{SECRET!r} {SECRET} {SECRET!s}"
    assert SECRET.fingerprint in shown
    body = SECRET.text().split(".")[1]
    assert body not in shown and SECRET.bearer not in shown and bytes(range(32)).hex() not in shown
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(SECRET)
    assert not hasattr(SECRET, "__dict__")

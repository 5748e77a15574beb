"""The cluster's one secret: 32 random bytes in a file of your own, and what is derived from them.

    upipe-token-1.<32 bytes, base64url>.<checksum>

Whoever holds it can run code on every node. It is looked for in $UPIPE_TOKEN_FILE, then ~/.config/upipe/token: a path
may stand in an environment or on a command line, the secret never does. It never travels either: from it HKDF-SHA256
derives, each under a purpose of its own, the bearer token of HTTP requests, the key of the cluster's CA (tls.py) and
the fingerprint. Losing one of these tells nothing of the others.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from upipe.errors import TokenError

VARIABLE = "UPIPE_TOKEN_FILE"
"""Environment variable that names the file (its path, never the secret)."""
SIZE = 32
"""Bytes of the secret."""
_PREFIX = "upipe-token-1"
_MOST = 4096
"""Bytes of the file that are read: a token has about 70."""


class Secret:
    """The secret in memory. It prints, logs and pickles as nothing; equality takes constant time."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if len(key) != SIZE:
            raise ValueError(f"a secret has {SIZE} bytes, not {len(key)}")
        self._key = key

    def derive(self, purpose: str, length: int = 32) -> bytes:
        """Bytes for one purpose, from which neither the secret nor the bytes of another purpose can be told."""
        return HKDF(SHA256(), length, salt=None, info=b"upipe 1 " + purpose.encode()).derive(self._key)

    @property
    def bearer(self) -> str:
        """What an HTTP request carries: `Authorization: Bearer <this>`."""
        return base64.urlsafe_b64encode(self.derive("http bearer")).decode().rstrip("=")

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits by which people and discovery tell clusters apart; no secret."""
        return self.derive("fingerprint", 8).hex()

    def text(self) -> str:
        """The line of the file. The one way out of this object: only `create` and tests call it."""
        body = base64.urlsafe_b64encode(self._key).decode().rstrip("=")
        return f"{_PREFIX}.{body}.{_checksum(body)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._key, other._key)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"<Secret of cluster {self.fingerprint}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("the secret of a cluster is not pickled: no worker needs it; pass the path of its file")


def _checksum(body: str) -> str:
    return hashlib.sha256(f"{_PREFIX}.{body}".encode()).hexdigest()[:8]


def parse(text: str, where: str) -> Secret:
    """Read the text of a token file.

    Raises:
        TokenError: says what is wrong with it, never what stands in it.
    """
    prefix, _, rest = text.strip().partition(".")
    body, _, checksum = rest.partition(".")
    if not prefix.startswith("upipe-token-"):
        raise TokenError(
            f"{where} is no token of uPipe: make one with `upipe token create`, or copy the cluster's file"
        )
    if prefix != _PREFIX:
        raise TokenError(f"{where} is a token of another format than {_PREFIX}: use one version of uPipe on all hosts")
    try:
        key = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != SIZE or not hmac.compare_digest(checksum.encode(), _checksum(body).encode()):
        raise TokenError(f"{where} is damaged (its checksum does not fit): copy the cluster's token file again")
    return Secret(key)


# ---------------------------------------------------------------------------------------------------- the file


def place(environment: Mapping[str, str] | None = None) -> Path:
    """Where the token file of this user is, or would be."""
    environment = os.environ if environment is None else environment
    if named := environment.get(VARIABLE):
        return Path(named).expanduser()
    return Path(environment.get("HOME") or Path.home()) / ".config" / "upipe" / "token"


def without_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for workers: without the path of the token file too, since user code has no business there."""
    return {name: value for name, value in environment.items() if name != VARIABLE}


def load(path: Path | None = None) -> Secret:
    """The secret of this user's cluster.

    Args:
        path: the file; default as `place` finds it.

    Raises:
        TokenError: there is none, it is damaged, not yours, or open to others.
    """
    path = path or place()
    try:
        # NONBLOCK: a fifo laid there must not hang us. NOFOLLOW: a link may point at what others can write.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise TokenError(
            f"no cluster token at {path}: make one with `upipe token create` on one host, and copy it to the others"
        ) from None
    except OSError as error:
        raise TokenError(f"the cluster token {path} cannot be opened: {_why(error)}") from None
    try:
        if fault := _fault(os.fstat(fd), os.geteuid()):
            raise TokenError(f"the cluster token {path} {fault}")
        return parse(os.read(fd, _MOST).decode("ascii", "replace"), str(path))
    finally:
        os.close(fd)


def _why(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "it belongs to someone else; each user has a copy of their own"
    if os.path.islink(str(error.filename)):
        return "it is a symbolic link; name the file itself"
    return os.strerror(error.errno or 0)


def _fault(status: os.stat_result, user: int) -> str:
    """Why such a file is not used; "" when it may be."""
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file: name the file that `upipe token create` made"
    if status.st_uid != user:
        return f"belongs to user {status.st_uid}, and you are {user}: each user has a copy of their own"
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        return f"is open to others (mode {mode:04o}): `chmod 600` it, and make a new one if others may have read it"
    return ""


def create(path: Path, force: bool = False) -> Secret:
    """Make a new secret and its file, 0600, whole or not at all; missing directories are made 0700.

    Raises:
        TokenError: there is one already and `force` is not given, or it cannot be written.
    """
    secret = Secret(secrets.token_bytes(SIZE))
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _make_directories(path.parent)
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w") as file:
                file.write(secret.text() + "\n")
                file.flush()
                os.fsync(file.fileno())
            if force:
                os.rename(aside, path)
            else:
                os.link(aside, path)  # unlike rename, never replaces: two creators at once make one token
        finally:
            aside.unlink(missing_ok=True)
    except FileExistsError:
        raise TokenError(
            f"there is a token at {path} already: its cluster would be closed to this host by a new one. "
            "--force replaces it"
        ) from None
    except OSError as error:
        raise TokenError(f"no token could be made at {path}: {error.strerror}") from None
    return secret


def _make_directories(directory: Path) -> None:
    for one in reversed((directory, *directory.parents)):
        if not one.exists():
            one.mkdir(mode=0o700, exist_ok=True)

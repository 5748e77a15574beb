"""Zip archives of directories: made so that equal contents are equal bytes, and unpacked so that nothing leaves its
directory.

An archive comes from who holds the cluster's token, and its hash was checked; it is unpacked as carefully all the same:
only files and directories, below the target, within bounds, never through a link, and never over what is there.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from upipe.errors import ArchiveRefused
from upipe.settings import MIB

MOST_BYTES = 256 * MIB
"""Of the files of one archive, unpacked. More is data, which belongs into storage that the nodes share."""
MOST_FILES = 20_000
SKIPPED = frozenset({".git", ".hg", ".svn", "__pycache__", ".venv", "venv", ".tox", ".mypy_cache", ".pytest_cache",
    ".ruff_cache", "node_modules"})  # fmt: skip
"""Directories that never travel: history, caches, and environments, which hold for one machine only."""
ENVIRONMENT = "pyvenv.cfg"
"""Marks a virtual environment, whatever its name."""
_DATE = (1980, 1, 1, 0, 0, 0)
_EXECUTABLE = 0o100


def pack(directory: Path, most: int = MOST_BYTES) -> bytes:
    """The directory's files as a zip archive, without SKIPPED and *.pyc. Symbolic links to files below it are followed,
    others are left out.

    Raises:
        ArchiveRefused: it is no directory, too large, or a file cannot be read; names it.
    """
    if not directory.is_dir():
        raise ArchiveRefused(f"{directory} is no directory; name the one that holds the script")
    root = directory.resolve()
    return _zipped(_files(root), lambda path: path.relative_to(root), str(directory), most)


def pack_module(places: Iterable[Path], name: str, most: int) -> bytes:
    """A top-level module (a file) or package (one directory, or several of a namespace) as an archive that can stand
    in sys.path.

    Raises:
        As `pack`.
    """
    content: dict[Path, PurePosixPath] = {}
    for place in places:
        if place.is_dir():
            content.update((path, PurePosixPath(name, *path.relative_to(place).parts)) for path in _files(place))
        else:
            content[place] = PurePosixPath(place.name)
    where = ", ".join(str(place) for place in places)
    return _zipped(content, lambda path: content[path], where, most)


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.endswith(".egg-info"))
        if ENVIRONMENT in names and folder != str(root):
            folders.clear()
            continue
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith((".pyc", ".pyo")) or not path.is_file():
                continue
            if path.is_symlink() and root not in path.resolve().parents:
                continue
            yield path


def _zipped(paths: Iterable[Path], named: Callable[[Path], object], where: str, most: int) -> bytes:
    found = sorted(((path, str(named(path))) for path in paths), key=lambda pair: pair[1])
    _refuse_large([path for path, _ in found], where, most)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path, name in found:
            try:
                info = zipfile.ZipInfo(name, _DATE)
                info.external_attr = (stat.S_IFREG | (0o755 if path.stat().st_mode & _EXECUTABLE else 0o644)) << 16
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())
            except (OSError, ValueError, UnicodeError) as error:
                raise ArchiveRefused(f"{path} cannot be shipped: {error}") from None
    return buffer.getvalue()


def _refuse_large(paths: list[Path], where: str, most: int) -> None:
    """Before anything is read."""
    try:
        sizes = sorted(((path.stat().st_size, str(path)) for path in paths), reverse=True)
    except OSError as error:
        raise ArchiveRefused(f"{where} cannot be shipped: {error}") from None
    if sum(size for size, _ in sizes) > most or len(sizes) > MOST_FILES:
        largest = ", ".join(f"{path} ({size / MIB:,.1f} MiB)" for size, path in sizes[:3])
        raise ArchiveRefused(
            f"{where} is too large to be shipped: more than {most // MIB} MiB or {MOST_FILES:,} files; keep data "
            f"elsewhere, or start from a directory that holds only the code. The largest: {largest}"
        )


# ---------------------------------------------------------------------------------------------------- unpacking


def unpack(data: bytes, target: Path, most: int = MOST_BYTES) -> None:
    """Unpack into a directory that must not exist yet (0700). It appears whole or not at all.

    Raises:
        ArchiveRefused: it is no archive, holds names that lead elsewhere, links, or too much; OSError.
    """
    aside = target.with_name(f".{target.name}.unpacking")
    if aside.exists():  # a crash left it: only one unpacks here at a time
        shutil.rmtree(aside)
    aside.mkdir(mode=0o700, parents=True)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check(archive.infolist(), most)
            left = most
            for info in archive.infolist():
                left -= _extract(archive, info, aside, left)
        os.rename(aside, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, UnicodeError) as error:
        raise ArchiveRefused(f"that is no zip archive of ours: {error}") from None
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def unpacked_size(data: bytes) -> int:
    """Bytes of all its files, as its directory says. Raises zipfile.BadZipFile."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return sum(info.file_size for info in archive.infolist())


def _check(entries: list[zipfile.ZipInfo], most: int) -> None:
    if len(entries) > MOST_FILES or sum(info.file_size for info in entries) > most:
        raise ArchiveRefused(f"the archive holds more than {most // MIB} MiB or {MOST_FILES:,} files")
    seen: set[str] = set()
    for info in entries:
        name = info.filename
        path = PurePosixPath(name)
        mode = info.external_attr >> 16
        if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ArchiveRefused(f"the archive holds {name[:100]!r}, which would lie outside its directory")
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
            raise ArchiveRefused(f"the archive holds {name[:100]!r}, which is no plain file")
        if name in seen:
            raise ArchiveRefused(f"the archive holds {name[:100]!r} twice")
        seen.add(name)


def _extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, root: Path, left: int) -> int:
    place = root.joinpath(*PurePosixPath(info.filename).parts)
    if info.is_dir():
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        return 0
    try:
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = 0o700 if info.external_attr >> 16 & _EXECUTABLE else 0o600
        fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise ArchiveRefused(f"the archive holds {info.filename[:100]!r} as a file and as a directory") from None
    written = 0
    with os.fdopen(fd, "wb") as file, archive.open(info) as source:
        while piece := source.read(MIB):  # what the directory of the archive says of sizes may be a lie
            written += len(piece)
            if written > left:
                raise ArchiveRefused("the archive holds more than it says")
            file.write(piece)
    return written

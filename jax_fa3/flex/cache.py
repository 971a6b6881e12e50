"""Linked kernels on disk, so that a second process need not link them again.

A file is named by a hash of all that its machine code follows from, and begins with a hash of its
own content. The machine code will run on the GPU with the process' rights, so a folder that others
may write to is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "JAX_FA3_CACHE_DIR"  # the folder's path; empty: no cache
MOST_BYTES = 256 << 20
_SUFFIX = ".cubin"
_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path | None:
    """Where linked kernels are kept; None where they are not."""
    path = os.environ.get(VARIABLE)
    if path is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        path = os.path.join(os.path.expanduser(base), "jax_fa3")
    return Path(path) if path else None


def why_not(path: Path) -> str | None:
    """Why a folder is not used as a cache; None where it is. Makes it if it is missing."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        return f"{path} cannot be made ({error.strerror})"
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {path}"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} cannot be written to"
    return None


def key(*parts: str | bytes) -> str:
    """The name of what these parts make."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def load(name: str) -> bytes | None:
    """What was stored, or None: nothing was, or what is there is damaged."""
    path = _path(name)
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used last: dropped last
    return data


def store(name: str, data: bytes) -> None:
    """Keeps `data`, if there is a place for it. Another process that stores the same is no harm:
    each writes a file of its own and renames it."""
    path = _path(name)
    if path is None:
        return
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
        _drop_oldest(path.parent)
    except OSError:
        return


def size() -> int:
    """Bytes of all that is kept."""
    path = folder()
    return 0 if path is None else sum(status.st_size for _, status in _files(path))


def _path(name: str) -> Path | None:
    path = folder()
    return None if path is None or why_not(path) else path / (name + _SUFFIX)


def _files(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for file in path.glob("*" + _SUFFIX):
        with contextlib.suppress(OSError):  # another process has dropped it
            yield file, file.stat()


def _drop_oldest(path: Path) -> None:
    files = sorted(_files(path), key=lambda file: file[1].st_mtime)
    total = sum(status.st_size for _, status in files)
    for file, status in files[:-1]:
        if total <= MOST_BYTES:
            return
        file.unlink(missing_ok=True)
        total -= status.st_size

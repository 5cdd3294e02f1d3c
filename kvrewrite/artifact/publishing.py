"""Puts finished folders in place: staging beside the target, one atomic step, and recovery after killed runs."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from kvrewrite.errors import ArtifactError

_EXCHANGE = 2  # Linux' RENAME_EXCHANGE
_HERE = -100  # Linux' AT_FDCWD
# Errors of renameat2 if the kernel or the file system has no exchange.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """Makes a new folder beside `out`; removes it afterwards unless it was renamed."""
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    try:
        folder.mkdir()
        yield folder
    finally:  # after any exception, Ctrl-C included
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def leftovers(out: Path) -> tuple[list[Path], list[Path]]:
    """Returns what killed runs left beside `out`: unfinished folders, and whole ones moved aside."""
    try:
        names = sorted(p for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.") and p.is_dir())
    except OSError:
        return [], []
    return [p for p in names if p.suffix == ".partial"], [p for p in names if p.suffix == ".old"]


def recover(out: Path, own: Path | None = None) -> None:
    """Restores what a killed run had moved aside, and warns about what such runs left. own: a folder of this run."""
    partial, old = leftovers(out)
    partial = [p for p in partial if p != own]
    if not out.exists() and len(old) == 1:
        os.replace(old[0], out)
        warnings.warn(f"a run that replaced {out} was killed; the former directory is in its place again", stacklevel=3)
        old = []
    if partial or old:
        names = ", ".join(str(p) for p in (*partial, *old))
        warnings.warn(
            f"runs that were killed while they wrote {out} left {names}. Where no other run is at work, delete the folders "
            "that end in .partial; one that ends in .old is a whole former directory, which you may rename or delete",
            stacklevel=3,
        )


def exchange(a: Path, b: Path) -> bool:
    """Swaps two paths in one step; False if the kernel or the file system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(b))


def publish(folder: Path, out: Path, check: Callable[[], None] | None) -> None:
    """Renames the finished folder to `out` in one step.

    check: None: `out` must not exist or be an empty folder, else ArtifactError, and nothing is deleted. Otherwise what
    is there is replaced after `check` has accepted it. If folders can't be exchanged, it is moved aside first;
    `recover` restores it if the process is killed between the two renames.
    """
    if check is None:
        _take_free_place(folder, out)
        return
    check()
    if not out.exists():
        _take_free_place(folder, out)
    elif exchange(folder, out):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        _replace(folder, out)


def _take_free_place(folder: Path, out: Path) -> None:
    try:
        os.rename(folder, out)  # replaces a folder only if it is empty
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ArtifactError(
            f"something appeared at {out} while the model was written, so the model was not put there, and nothing was "
            "deleted; choose another output directory, or replace it with force=True (--force)"
        ) from error


def _replace(folder: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.{secrets.token_hex(4)}.old"
    try:
        os.replace(out, old)
        os.replace(folder, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    finally:
        if old.exists() and out.exists():
            shutil.rmtree(old, ignore_errors=True)

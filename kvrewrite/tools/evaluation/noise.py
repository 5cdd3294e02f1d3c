"""Filler around the facts of a task: plain prose, or code of the standard library."""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

NOISE = (
    " The road is long.",
    " The air is clear.",
    " The day is bright.",
    " We walk on.",
    " Up and down again.",
)
_MODULES = """argparse ast asyncio.base_events asyncio.tasks bdb calendar cmd codecs collections.__init__ configparser contextlib
copy csv dataclasses datetime difflib dis doctest email.message enum fileinput fnmatch fractions ftplib functools glob
gzip heapq html.parser http.client imaplib inspect ipaddress json.decoder json.encoder locale logging.__init__ mailbox
mimetypes numbers operator optparse os pathlib pdb pickle pickletools platform plistlib posixpath pprint queue random
sched selectors shelve shlex shutil smtplib socket socketserver ssl statistics string subprocess tarfile tempfile textwrap
threading timeit tokenize trace traceback turtle types typing unittest.case unittest.mock urllib.parse urllib.request uuid
warnings weakref xml.dom.minidom zipfile"""


LONGEST_LINE = 96


@cache
def prose() -> tuple[str, ...]:
    """Returns lines of Python's reference topics in order, each a piece that begins with a line break; empty if
    missing."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return ()
    lines = (" ".join(line.split()) for name in sorted(topics) for line in topics[name].splitlines())
    return tuple("\n" + line for line in lines if line.isascii() and len(line) <= LONGEST_LINE and line.count(" ") >= 2)


@cache
def code() -> tuple[str, ...]:
    """Returns lines of standard library modules in order, indented, each a piece that starts with a line break."""
    root = Path(sysconfig.get_path("stdlib"))
    lines: list[str] = []
    for name in _MODULES.split():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if path.is_file():
            lines += path.read_text(encoding="utf-8").splitlines()
    kept = (line.rstrip() for line in lines if line.isascii() and "\t" not in line and "\f" not in line)
    return tuple("\n" + line for line in kept if line.strip() and len(line) <= LONGEST_LINE)


def repeat_lines(lines: tuple[str, ...], start: int) -> Iterator[str]:
    while True:
        yield from lines[start:]
        yield from lines[:start]

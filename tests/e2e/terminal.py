"""A program on a real terminal: a pseudo-terminal of the kernel, its own session, Ctrl-C by the key."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

CTRL_C = b"\x03"
ROWS, COLUMNS = 30, 100
_HIDE, _SHOW = "\x1b[?25l", "\x1b[?25h"
_ESCAPE = re.compile(r"\x1b(?:\[[0-9;?]*[A-Za-z]|[=>])")
# A session's first terminal becomes its own, so that a key can signal what runs on it.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execvp(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """One program on one terminal. Use it as a context manager.

    Attributes:
        said: all that the program wrote, escape sequences included.
        code: its exit code, once `finish` has returned.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str], folder: Path) -> None:
        self.said, self.code = "", -1
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self._before: list[Any] = termios.tcgetattr(theirs)
        self._theirs = theirs
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *command], env={"TERM": "xterm", **env}, cwd=folder,
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def press(self, key: bytes) -> None:
        """Press a key."""
        os.write(self._ours, key)

    def read_until(self, text: str, timeout_s: float = 60) -> None:
        """Read until `text` was said."""
        deadline = time.monotonic() + timeout_s
        while text not in self.said:
            assert time.monotonic() < deadline, f"never said {text!r}:\n{self.text}"
            self._read()

    def finish(self, timeout_s: float = 120) -> None:
        """Read until the program has ended."""
        deadline = time.monotonic() + timeout_s
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"never ended:\n{self.text}"
            self._read()
        while self._read():
            pass
        self.code = self._process.returncode

    @property
    def text(self) -> str:
        """What was said, without escape sequences."""
        return _ESCAPE.sub("", self.said)

    @property
    def is_sane(self) -> bool:
        """Whether the cursor can be seen and the keys do what they did before."""
        shows_cursor = self.said.rfind(_SHOW) >= self.said.rfind(_HIDE)
        return shows_cursor and termios.tcgetattr(self._theirs) == self._before

    @property
    def hid_cursor(self) -> bool:
        """Whether there was a live display."""
        return _HIDE in self.said

    def _read(self) -> bool:
        ready, _, _ = select.select([self._ours], [], [], 0.1)
        if ready:
            self.said += os.read(self._ours, 1 << 16).decode(errors="replace")
        return bool(ready)

"""The only speaker to GitHub's runner: commands in the log, and the files that it reads after the step.

Outside GitHub the same calls give a plain log, and the files are left alone.

The runner takes a log line that starts with `::` (after spaces), or that holds `##[` anywhere, as a command, and
it splits lines at a bare carriage return too. So no text is ever printed as it is: see `_inert`.

Source: actions/runner, ActionCommand.cs, FileCommandManager.cs; actions/toolkit, command.ts, file-command.ts.
"""

from __future__ import annotations

import io
import re
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Protocol

from runner.protocol.errors import Problem, RunnerError
from runner.supervisor.masking import hide

MAX_SUMMARY_BYTES = 900 << 10  # the runner drops a summary above 1 MiB as a whole
MAX_MESSAGE_CHARS = 3_500  # it cuts a message at 4096
MAX_TITLE_CHARS = 200
MAX_ANNOTATIONS = 10  # of each kind in one step; the rest would be dropped

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CONTINUED = " (continued)"
_CUT = "\n\n> The rest was cut here: a summary may hold 1 MiB. The whole text is in the report's files.\n"


class Stream(Protocol):
    """Where the log goes: standard output, or a live display."""

    def write(self, text: str, /) -> int:
        """Write whole lines."""

    def flush(self) -> None:
        """Show what was written."""


class GitHub:
    """What can be said to the runner.

    Attributes:
        is_active: whether a runner is listening.
    """

    def __init__(self, environ: Mapping[str, str], out: Stream) -> None:
        """Speak on `out` and into the files that `environ` names."""
        self.is_active = environ.get("GITHUB_ACTIONS") == "true"
        self._out = out
        self._files = {name: environ.get(f"GITHUB_{name}", "") for name in ("OUTPUT", "STATE", "STEP_SUMMARY")}
        self._secrets: list[str] = []
        self._annotations: Counter[str] = Counter()
        self._group: str | None = None
        self._lock = threading.RLock()  # several threads speak, and a line must not begin in the middle of another

    def mask(self, value: str) -> None:
        """Hide `value`, and each of its lines, in everything that is said from now on, here and by the runner."""
        self._secrets.append(value)
        for line in {line.strip() for line in (value, *value.splitlines())}:
            if line and self.is_active:
                self._print(f"::add-mask::{_escape_data(line)}")

    def redact(self, text: str) -> str:
        """Return `text` with every masked value replaced by `***`; see `runner.supervisor.masking`."""
        return hide(text, self._secrets)

    def begin_group(self, title: str) -> None:
        """Fold everything that is said from now on under `title`. A group that is open ends: the runner nests none."""
        with self._lock:
            self.end_group()
            self._group = self.redact(" ".join(title.split()))
            self._print(f"::group::{_escape_data(self._group)}" if self.is_active else _inert(f"== {self._group}"))

    def end_group(self) -> None:
        """End the group that is open, if one is."""
        with self._lock:
            if self._group is not None and self.is_active:
                self._print("::endgroup::")
            self._group = None

    @contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Fold everything that is said inside under `title`."""
        self.begin_group(title)
        try:
            yield
        finally:
            self.end_group()

    def info(self, text: str) -> None:
        """Log `text`, which may come from anywhere; none of its lines can become a command."""
        for line in re.split(r"\r\n|\n|\r", self.redact(text)):
            self._print(_inert(line))

    @contextmanager
    def relayed_stderr(self) -> Iterator[None]:
        """Say through `info` what libraries write to Python's standard error: warnings, log records, progress bars."""
        relay = _Relay(self)
        with redirect_stderr(relay):
            try:
                yield
            finally:
                relay.close()

    def error(self, problem: Problem) -> None:
        """Tell a problem: as an annotation of the run, and in the log."""
        self._annotate("error", problem.what, f"{problem.what}\nWhy: {problem.why}\nFix: {problem.fix}")

    def warning(self, title: str, text: str) -> None:
        """Tell something that did not stop the run."""
        self._annotate("warning", title, text)

    def set_outputs(self, outputs: Mapping[str, str]) -> None:
        """Give `outputs` to the steps that follow; outside GitHub they are logged.

        Raises:
            RunnerError: the runner's file cannot be written.
            ValueError: a name that no output can have, or a value that holds the delimiter: a bug of the caller.
        """
        self._write_entries("OUTPUT", outputs)
        if not self.is_active:
            for name, value in outputs.items():
                self.info(f"{name}: {value}")

    def save_state(self, state: Mapping[str, str]) -> None:
        """Keep `state` for the action's post step, as `STATE_<name>`.

        Raises:
            RunnerError: the runner's file cannot be written.
            ValueError: as for `set_outputs`.
        """
        self._write_entries("STATE", state)

    def append_summary(self, markdown: str) -> None:
        """Add `markdown` to the page of the run, cut where the page would be dropped for its size.

        Raises:
            RunnerError: the runner's file cannot be written.
        """
        path = self._files["STEP_SUMMARY"]
        if not self.is_active or not path:
            return
        try:
            room = MAX_SUMMARY_BYTES - Path(path).stat().st_size if Path(path).exists() else MAX_SUMMARY_BYTES
        except OSError as error:
            raise _unwritable(path, error) from error
        self._append(path, _fitted(self.redact(markdown).rstrip("\n") + "\n", room))

    def _annotate(self, kind: str, title: str, text: str) -> None:
        title, text = self.redact(title), self.redact(text)
        self._annotations[kind] += 1
        with self._outside_groups():
            if not self.is_active or self._annotations[kind] > MAX_ANNOTATIONS:
                self.info(f"{kind}: {text}" if text.startswith(title) else f"{kind}: {title}\n{text}")
                return
            title = _escape_property(_cut(" ".join(title.split()), MAX_TITLE_CHARS))
            self._print(f"::{kind} title={title}::{_escape_data(_cut(_printable(text), MAX_MESSAGE_CHARS))}")

    @contextmanager
    def _outside_groups(self) -> Iterator[None]:
        """Interrupt the open group for what nobody may have to unfold."""
        with self._lock:
            group = self._group if self.is_active else None
            if group is not None:
                self.end_group()
            yield
            if group is not None:
                self.begin_group(group if group.endswith(_CONTINUED) else group + _CONTINUED)

    def _write_entries(self, file: str, entries: Mapping[str, str]) -> None:
        lines = [_entry(name, self.redact(value)) for name, value in entries.items()]
        if self.is_active and self._files[file] and lines:
            self._append(self._files[file], "".join(lines))

    def _append(self, path: str, text: str) -> None:
        try:
            with Path(path).open("ab") as file:
                file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            raise _unwritable(path, error) from error

    def _print(self, line: str) -> None:
        with self._lock:
            self._out.write(line.encode("utf-8", "replace").decode("utf-8") + "\n")
            self._out.flush()


class _Relay(io.TextIOBase):
    """A text stream whose every line is told as text."""

    def __init__(self, github: GitHub) -> None:
        self._github = github
        self._rest = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._github.info(line)
        return len(text)

    def close(self) -> None:
        if self._rest:
            self._github.info(self._rest)
            self._rest = ""
        # Not closed: a library may keep it as the stream of its log handler.


def _inert(line: str) -> str:
    """Return `line` so that no runner takes it, or a part of it, as a command."""
    line = _printable(line).replace("##[", "## [")
    return f"| {line}" if line.lstrip().startswith("::") else line


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def _escape_data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _escape_property(text: str) -> str:
    return _escape_data(text).replace(":", "%3A").replace(",", "%2C")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _entry(name: str, value: str) -> str:
    delimiter = f"ghadelimiter_{uuid.uuid4()}"
    if not _NAME.fullmatch(name) or delimiter in value:
        raise ValueError(f"not an entry that can be written: {name!r}")
    return f"{name}<<{delimiter}\n{value}\n{delimiter}\n"


def _fitted(markdown: str, room: int) -> str:
    """Return `markdown`, cut at a line's end so that it takes at most `room` bytes; all that was open is closed."""
    encoded = markdown.encode("utf-8", "replace")
    if len(encoded) <= room:
        return markdown
    closing_bytes = 4 << 10
    lines = encoded[: max(room - closing_bytes, 0)].decode("utf-8", "ignore").rpartition("\n")[0]
    if not lines:
        return ""
    closing = "\n```" if sum(line.lstrip().startswith("```") for line in lines.split("\n")) % 2 else ""
    closing += "</pre>" * (lines.count("<pre>") > lines.count("</pre>"))
    closing += "\n\n</details>" * (lines.count("<details>") - lines.count("</details>"))
    return lines + closing + _CUT


def _unwritable(path: str, error: OSError) -> RunnerError:
    return RunnerError(
        f"The runner's file {path!r} cannot be written ({error.strerror}).",
        why="Outputs and summary go to the workflow through this file; the container must run as root to write it.",
        fix="Remove `USER` from the image and `--user` from the command, or free space on the runner's disk.",
    )

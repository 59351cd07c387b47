"""How GitHub's runner reads what a step says: commands in the log, entries in files, secrets to hide.

Written after actions/runner v2.336.0: ActionCommand.cs, ActionCommandManager.cs, FileCommandManager.cs (its class
EnvFileKeyValuePairs), HostContext.cs. What the runner forgives silently, but an action of ours must not do, is a
violation here.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

MAX_SUMMARY_BYTES = 1 << 20
MAX_ANNOTATIONS = 10
MAX_MESSAGE_CHARS = 4096
KINDS = ("debug", "notice", "warning", "error")
COMMANDS = frozenset({*KINDS, "add-mask", "group", "endgroup", "echo", "add-matcher", "remove-matcher"})
FORBIDDEN = frozenset({"set-output", "save-state", "set-env", "add-path", "internal-set-repo-path"})


class InvalidFile(Exception):
    """A file of entries that makes the runner fail the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    name: str
    properties: dict[str, str]
    data: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    kind: str
    title: str
    message: str


def parse_entries(text: str) -> dict[str, str]:
    """Return the entries of an output or state file; raise InvalidFile where the runner throws."""
    entries: dict[str, str] = {}
    lines = _lines(text)
    for line, _ in lines:
        if not line:
            continue
        equals, heredoc = line.find("="), line.find("<<")
        if heredoc >= 0 and (equals < 0 or heredoc < equals):
            name, delimiter = line.split("<<", 1)
            if not name or not delimiter:
                raise InvalidFile(f"name and delimiter must not be empty: {line!r}")
            entries[name] = _heredoc(lines, delimiter)
        elif equals > 0:
            name, value = line.split("=", 1)
            entries[name] = value
        else:
            raise InvalidFile(f"invalid format: {line!r}")
    return entries


def parse_command(line: str, registered: frozenset[str]) -> Command | None:
    """Return the command in a line of the log, in the new form or in the old one, or None."""
    stripped = line.lstrip()
    if stripped.startswith("::") and (end := stripped.find("::", 2)) >= 0:
        name, _, rest = stripped[2:end].partition(" ")
        if name.lower() in registered:
            properties = _properties(rest.strip(), ",", (("\r", "%0D"), ("\n", "%0A"), (":", "%3A"), (",", "%2C")))
            data = _unescape(stripped[end + 2 :], (("\r", "%0D"), ("\n", "%0A")))
            return Command(name=name.lower(), properties=properties, data=data)
    begin = line.find("##[")
    end = line.find("]", begin)
    if begin < 0 or end < 0:
        return None
    name, _, rest = line[begin + 3 : end].partition(" ")
    if name.lower() not in registered:
        return None
    escapes = ((";", "%3B"), ("\r", "%0D"), ("\n", "%0A"), ("]", "%5D"))
    return Command(
        name=name.lower(), properties=_properties(rest, ";", escapes), data=_unescape(line[end + 1 :], escapes)
    )


@dataclass(slots=True, kw_only=True)
class Log:
    """The runner's side of a step's output.

    Attributes:
        secrets: what is hidden; the workflow's own secrets from the start, then what `add-mask` adds.
        lines: as the log shows them.
        raw_lines: as the step printed them, without those that only add a mask.
        annotations: as the page of the run shows them.
        violations: what an action must not do.
        depth: how many groups are open.
    """

    secrets: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)
    raw_lines: list[str] = field(default_factory=list)
    annotations: list[Annotation] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    depth: int = 0
    _stop_token: str | None = None

    def read(self, text: str) -> None:
        """Take the next part of the output, made of whole lines; a bare carriage return ends a line too."""
        for line in re.split(r"\r\n|\n|\r", text.removesuffix("\n")):
            self._read_line(line)

    def finish(self, *, is_killed: bool = False) -> None:
        """Say what was left open; a process that was killed can close no group."""
        if self.depth and not is_killed:
            self.violations.append(f"{self.depth} groups were not closed")
        if self._stop_token is not None:
            self.violations.append("commands were stopped and never resumed")

    def hide(self, text: str) -> str:
        """Return `text` with every secret hidden, in each form that the runner knows."""
        forms = {form for secret in self.secrets for form in _forms(secret)}
        for form in sorted(forms, key=len, reverse=True):
            text = text.replace(form, "***")
        return text

    def _read_line(self, line: str) -> None:
        registered = frozenset({*COMMANDS, *FORBIDDEN, "stop-commands"} | {(self._stop_token or "").lower()} - {""})
        command = parse_command(line, registered)
        if command is None or command.name != "add-mask" or self._stop_token is not None:
            self.raw_lines.append(line)
        if command is None:
            self.lines.append(self.hide(line))
        elif self._stop_token is not None:
            if command.name == self._stop_token.lower():
                self._stop_token = None
            self.lines.append(self.hide(line))
        else:
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command.name:
            case "stop-commands":
                self._stop_token = command.data
            case "add-mask" if not command.data.strip():
                self.violations.append("add-mask of nothing")
            case "add-mask":
                self.secrets |= {command.data, *(line for line in re.split(r"[\r\n]+", command.data) if line)}
            case "group":
                self.depth += 1
                self.lines.append(self.hide(f"▼ {command.data}"))
            case "endgroup":
                self.depth -= 1
                if self.depth < 0:
                    self.violations.append("endgroup without a group")
            case "debug" | "notice" | "warning" | "error":
                self._annotate(command)
            case _:
                self.violations.append(f"the command {command.name!r} is deprecated, disabled or not for actions")

    def _annotate(self, command: Command) -> None:
        message = self.hide(command.data)
        self.lines.append(f"{command.name.capitalize()}: {message}")
        if command.name == "debug":
            return
        if unknown := command.properties.keys() - {"title", "file", "line", "col", "endLine", "endColumn"}:
            self.violations.append(f"an annotation has the properties {sorted(unknown)}: was its title escaped?")
        if len(command.data) > MAX_MESSAGE_CHARS:
            self.violations.append(f"an annotation of {len(command.data)} characters is cut at {MAX_MESSAGE_CHARS}")
        title = self.hide(command.properties.get("title", ""))
        self.annotations.append(Annotation(kind=command.name, title=title, message=message[:MAX_MESSAGE_CHARS]))
        if sum(one.kind == command.name for one in self.annotations) > MAX_ANNOTATIONS:
            self.violations.append(f"more than {MAX_ANNOTATIONS} annotations of the kind {command.name!r}")


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Yield every line with its line break; only LF is one, and the last line may have none."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        if end < 0:
            yield text[start:], ""
            return
        yield text[start:end], "\n"
        start = end + 1


def _heredoc(lines: Iterator[tuple[str, str]], delimiter: str) -> str:
    value: list[str] = []
    for line, newline in lines:
        if line == delimiter:
            return "\n".join(value)
        if not newline:
            raise InvalidFile("the value is not ended by a line break")
        value.append(line)
    raise InvalidFile(f"matching delimiter not found: {delimiter!r}")


def _properties(text: str, separator: str, escapes: tuple[tuple[str, str], ...]) -> dict[str, str]:
    pairs = (part.split("=", 1) for part in text.split(separator) if part)
    return {pair[0]: _unescape(pair[1], escapes) for pair in pairs if len(pair) == 2 and all(pair)}


def _unescape(text: str, escapes: tuple[tuple[str, str], ...]) -> str:
    for token, replacement in escapes:
        text = text.replace(replacement, token)
    return text.replace("%25", "%")


def _forms(secret: str) -> set[str]:
    if not secret:
        return set()
    encoded = secret.encode()
    shifted = {base64.b64encode(encoded[skip:]).decode().rstrip("=") for skip in range(min(3, len(encoded)))}
    forms = {secret, secret.strip(), quote(secret, safe=""), json.dumps(secret)[1:-1], *shifted}
    return {form for form in forms if form}

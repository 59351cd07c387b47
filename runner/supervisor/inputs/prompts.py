"""The user's own prompts for the verification: typed as lines, or one line that names a file.

Covered: a text file with one prompt a line, and JSON lines with `{"prompt": "…"}` or
`{"messages": [{"role": "…", "content": "…"}, …]}`. A chat becomes the compact JSON text of its object
with `messages` only; the judge applies the chat template. Everything else is literal text.
"""

from __future__ import annotations

import json
from pathlib import Path

from runner.protocol.errors import InputError, Problem
from runner.protocol.syntax import parse_json
from runner.supervisor.inputs.workspace import Workspace

MAX_FILE_BYTES = 1 << 20
MAX_PROMPTS = 256
MAX_PROMPT_CHARS = 16_384
_SUFFIXES = (".txt", ".jsonl")


def read_prompts(name: str, text: str, workspace: Workspace) -> tuple[str, ...]:
    """Return the prompts in their order, each not empty.

    Args:
        name: the input, for errors.
        text: its value; empty lines are dropped.
        workspace: where relative files are looked for.

    Raises:
        InputError: the file is missing, too large, not UTF-8 or not what its name says; too many or too long prompts.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    prompts = lines
    if len(lines) == 1 and (path := _named_file(name, lines[0], workspace)):
        prompts = _read_file(name, path, workspace.show(path))
    if len(prompts) > MAX_PROMPTS:
        raise _bad(
            name, f"holds {len(prompts)} prompts", f"At most {MAX_PROMPTS} are run.", "Choose the most telling ones."
        )
    for number, prompt in enumerate(prompts, start=1):
        if len(prompt) > MAX_PROMPT_CHARS:
            raise _bad(
                name,
                f"holds a prompt (number {number}) of {len(prompt)} characters",
                f"At most {MAX_PROMPT_CHARS} are run.",
                "Shorten it.",
            )
    return tuple(prompts)


def _named_file(name: str, line: str, workspace: Workspace) -> Path | None:
    is_spelt_as_path = line.startswith(("./", "../", "/", "~/")) or (line.endswith(_SUFFIXES) and " " not in line)
    if not is_spelt_as_path:
        try:
            path = workspace.locate(name, line)
        except InputError:
            return None  # a sentence such as "~ what is this?"
        return path if path.is_file() else None
    path = workspace.locate(name, line)
    if not path.is_file():
        raise _bad(
            name,
            f"names the file {line!r}, which does not exist",
            f"It was looked for at {str(path)!r}.",
            "Check the path, or write the prompts themselves, one a line.",
        )
    return path


def _read_file(name: str, path: Path, shown: str) -> list[str]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise _bad(name, f"names {shown!r}, which cannot be read", f"{error.strerror}.", "Check its rights.") from error
    if len(content) > MAX_FILE_BYTES:
        raise _bad(
            name,
            f"names {shown!r}, which is larger than {MAX_FILE_BYTES} bytes",
            "Prompts are read as a whole.",
            "Name a file of prompts, not a data set.",
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(name, f"names {shown!r}, which is not UTF-8", f"{error}.", "Save the file as UTF-8.") from error
    numbered = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not numbered:
        raise _bad(name, f"names {shown!r}, which holds no prompt", "Every line is empty.", "Write one prompt a line.")
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    return [_json_prompt(name, f"line {number} of {shown!r}", line) for number, line in numbered]


def _json_prompt(name: str, where: str, line: str) -> str:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise _bad(name, f"has no JSON in {where}", f"{error}.", "Write one JSON object a line.") from error
    match entry:
        case {"prompt": str(prompt)} if prompt.strip():
            return prompt.strip()
        case {"messages": [*messages]} if messages and all(_is_message(message) for message in messages):
            turns = [{"role": message["role"], "content": message["content"]} for message in messages]
            return json.dumps({"messages": turns}, ensure_ascii=False, separators=(",", ":"))
    raise _bad(
        name,
        f"has no prompt in {where}",
        "An object with a text `prompt`, or with `messages` of `role` and `content`, is expected.",
        'Write {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}.',
    )


def _is_message(message: object) -> bool:
    match message:
        case {"role": "system" | "user" | "assistant", "content": str()}:
            return True
    return False


def _bad(name: str, what: str, why: str, fix: str) -> InputError:
    return InputError([Problem(what=f"`{name}` {what}.", why=why, fix=fix)])

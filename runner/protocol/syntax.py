"""How the things that a user types must be spelled: repositories, revisions, tags, booleans; and JSON of strangers.

Pure text, no I/O.

Each `*_problem` function returns None for a good value, else the reason as the end of a sentence
("… is not a tag name: {reason}").
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

MAX_REPO_ID_CHARS = 96
MAX_REVISION_CHARS = 200

_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_])?")
_REF_FORBIDDEN = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]")
_LOOKS_LIKE_COMMIT = re.compile(r"[0-9a-fA-F]{7,40}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def parse_boolean(value: str) -> bool | None:
    """Return the boolean that YAML 1.2 reads in `value`, or None where it reads none.

    Source: the core schema, which `core.getBooleanInput` of actions/toolkit follows.
    """
    return _BOOLEANS.get(value)


def parse_json(content: bytes | str, **options: Any) -> Any:
    """Return the JSON value in `content`, which anybody may have written.

    Args:
        content: UTF-8 where it is bytes.
        options: of `json.loads`.

    Raises:
        ValueError: it is not JSON, or is nested deeper than Python can follow.
    """
    try:
        return json.loads(content, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_commit(revision: str) -> bool:
    """Return whether `revision` is a whole commit id: 40 lower-case hex digits."""
    return _COMMIT.fullmatch(revision) is not None


def repo_id_problem(repo_id: str) -> str | None:
    """Return why `repo_id` is not the `owner/name` of a repository, or None.

    Stricter than the Hub in one point: the old names without an owner (`gpt2`) are refused, because
    they cannot be told from a folder that is missing.
    """
    if repo_id.count("/") != 1:
        return "it must be `owner/name`, with one slash"
    if len(repo_id) > MAX_REPO_ID_CHARS:
        return f"it has {len(repo_id)} characters, and the Hub takes at most {MAX_REPO_ID_CHARS}"
    for part in repo_id.split("/"):
        if not _REPO_PART.fullmatch(part):
            return f"{part!r} must be letters, digits, `-`, `_` and `.`, and neither start nor end with `-` or `.`"
    if "--" in repo_id or ".." in repo_id:
        return "the Hub refuses `--` and `..` in a name"
    if repo_id.endswith(".git"):
        return "the Hub refuses a name that ends with `.git`"
    return None


def revision_problem(revision: str) -> str | None:
    """Return why `revision` cannot be a branch, tag or commit, or None.

    Source: git check-ref-format.
    """
    parts = revision.split("/")
    rules = (
        (not revision, "it is empty"),
        (len(revision) > MAX_REVISION_CHARS, f"it is longer than {MAX_REVISION_CHARS} characters"),
        (not revision.isprintable(), "it holds a character that cannot be printed"),
        (_REF_FORBIDDEN.search(revision), "git refuses spaces and any of `~ ^ : ? * [ \\` in a name"),
        (any(text in revision for text in ("..", "@{", "//")), "git refuses `..`, `@{` and `//` in a name"),
        (revision.startswith(("-", "/")), "git refuses a name that starts with `-` or `/`"),
        (revision.endswith(("/", ".")), "git refuses a name that ends with `/` or `.`"),
        (any(part.startswith(".") for part in parts), "git refuses a part that starts with `.`"),
        (any(part.endswith(".lock") for part in parts), "git refuses a part that ends with `.lock`"),
        (revision == "@", "git refuses `@` as a name"),
    )
    return next((reason for is_broken, reason in rules if is_broken), None)


def tag_problem(tag: str) -> str | None:
    """Return why `tag` cannot name a release, or None.

    Refused beside what git refuses: names that would be read as a branch or as a commit.
    """
    if reason := revision_problem(tag):
        return reason
    if tag.lower() in ("main", "head") or tag.startswith("refs/"):
        return "it reads as a branch or a ref, so nobody could tell what it names"
    if _LOOKS_LIKE_COMMIT.fullmatch(tag):
        return "it reads as a commit id, so nobody could tell what it names"
    return None


def endpoint_problem(address: str) -> str | None:
    """Return why `address` cannot be the address of a Hub, or None.

    Without encryption only this machine may be named: the token goes along with every request.
    """
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        return f"it is no URL ({error})"
    del port
    with suppress(ValueError):
        host = "localhost" if ip_address(host).is_loopback else host
    rules = (
        (parts.scheme not in ("https", "http"), "it must start with `https://`"),
        (not host, "it names no machine"),
        (parts.username is not None or parts.password is not None, "it holds a user or a password; tokens are inputs"),
        (bool(parts.query or parts.fragment), "it must end before `?` and `#`"),
        (parts.scheme == "http" and host != "localhost", "without `https` the token could be read on the way"),
        (any(character.isspace() for character in address), "it holds a space"),
    )
    return next((reason for is_broken, reason in rules if is_broken), None)

"""Raw input values, read one by one; every problem is noted and the reading goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from runner.errors import InputError, Problem
from runner.prompts import read_prompts
from runner.reference import RepoRef, read_reference
from runner.sources import INPUTS, nearest
from runner.syntax import parse_boolean, tag_problem
from runner.workspace import Workspace

T = TypeVar("T")


class Form:
    """The raw values, and the problems found while they are read."""

    def __init__(self, values: Mapping[str, str], problems: list[Problem], workspace: Workspace) -> None:
        self.values = values  # no entry: a problem was told already
        self.problems = problems
        self.workspace = workspace

    def attempt(self, read: Callable[[], T]) -> T | None:
        """Return what `read` returns, or None and its problems noted."""
        try:
            return read()
        except InputError as error:
            self.problems.extend(error.problems)
            return None

    def add(self, what: str, why: str, fix: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(what=what, why=why, fix=fix))

    def choice(self, name: str) -> str:
        """Return one of the input's choices; its default where the value is none of them."""
        spec = next(spec for spec in INPUTS if spec.name == name)
        value = self.values.get(name, spec.default)
        if value in spec.choices:
            return value
        match = nearest(value.lower(), spec.choices)
        self.add(
            f"`{name}` is {value!r}.",
            why=f"It must be one of: {', '.join(spec.choices)}.",
            fix=f"Did you mean `{match}`?" if match else f"Choose one, or leave it out for `{spec.default}`.",
        )
        return spec.default

    def boolean(self, name: str) -> bool:
        """Return the value of a `true` or `false`."""
        value = self.values.get(name, "false")
        answer = parse_boolean(value)
        if answer is None:
            self.add(
                f"`{name}` is {value!r}.",
                why="It must be `true` or `false`, as YAML writes them.",
                fix="Write `true` or `false`.",
            )
        return bool(answer)

    def checked(self, name: str, problem: Callable[[str], str | None], noun: str) -> str | None:
        """Return the value, or None where none was given.

        Args:
            name: the input.
            problem: says what is wrong with a value, as a sentence without its full stop; None for a good one.
            noun: what the value is to be, for the error.
        """
        value = self.values.get(name)
        if value and (reason := problem(value)):
            self.add(
                f"`{name}` is {value!r}, which is not {noun}.", why=f"{_capital(reason)}.", fix=f"Correct `{name}`."
            )
        return value or None

    def folder(self, name: str) -> Path | None:
        """Return a folder to write into, which need not exist yet."""
        value = self.values.get(name)
        path = self.attempt(lambda: self.workspace.locate(name, value)) if value else None
        if path is None or path.is_dir() or not path.exists():
            return path
        self.add(
            f"`{name}` is {value!r}, which is a file.",
            why="A folder is needed to write into.",
            fix="Name a folder; it is made if it is absent.",
        )
        return path

    def model(self, name: str) -> RepoRef | None:
        """Return the model that the input names."""
        value = self.values.get(name)
        return self.attempt(lambda: read_reference(name, value, self.workspace)) if value else None

    def base(self, revision: str | None) -> RepoRef | None:
        """Return the base model, with `revision` where that was given on its own."""
        base = self.model("base-model")
        if base is None or revision is None or base.revision == revision:
            return base
        if base.repo_id is not None and base.revision is None:
            return RepoRef(repo_id=base.repo_id, revision=revision)
        named = f"`base-model` names {base.revision!r}" if base.repo_id else "`base-model` is a local folder"
        self.add(
            f"`base-revision` is {revision!r}, but {named}.",
            why="Only one of them can be meant.",
            fix="Remove one of the two.",
        )
        return base

    def tag(self, event_tag: str | None) -> str | None:
        """Return the tag of the input, else that of the event."""
        tag = self.checked("tag", tag_problem, "a name for a tag")
        if tag or event_tag is None:
            return tag
        if reason := tag_problem(event_tag):
            self.add(
                f"The event's tag is {event_tag!r}, which is not a name for a tag on the Hub.",
                why=f"{_capital(reason)}.",
                fix="Set the input `tag`.",
            )
        return event_tag

    def prompts(self, name: str) -> tuple[str, ...]:
        """Return the prompts that the input holds or names."""
        value = self.values.get(name)
        return (self.attempt(lambda: read_prompts(name, value, self.workspace)) if value else None) or ()

    def require(self, name: str, why: str, fix: str) -> None:
        """Note that an input is missing, unless something else was told about it."""
        if self.values.get(name) == "":
            self.add(f"`{name}` is missing.", why=why, fix=fix)


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]

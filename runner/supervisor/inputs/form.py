"""Raw input values, read one by one; every problem is noted and the reading goes on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from runner.protocol.allow import Allow, entry_problem
from runner.protocol.combination import KINDS, MAJORITIES, PRUNING, RANDOM, VOTING, Combination
from runner.protocol.errors import InputError, Problem
from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import parse_boolean, tag_problem
from runner.supervisor.inputs.declared import INPUTS
from runner.supervisor.inputs.prompts import read_prompts
from runner.supervisor.inputs.reference import read_reference
from runner.supervisor.inputs.sources import nearest
from runner.supervisor.inputs.workspace import Workspace
from runner.supervisor.signature import SigningKey, read_signing_key

T = TypeVar("T")
N = TypeVar("N", int, float)
Weighted = tuple[RepoRef, float | None]
COMBINATION_INPUTS = ("combination", "combination-density", "combination-seed", "combination-majority-sign")


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
        return self.folder_at(name, self.values.get(name))

    def folder_at(self, name: str, value: str | None) -> Path | None:
        """Return the folder to write into that `value`, a part of the input, names."""
        path = self.attempt(lambda: self.workspace.locate(name, value)) if value else None
        if path is None or path.is_dir() or not path.exists():
            return path
        self.add(
            f"`{name}` is {value!r}, which is a file.",
            why="A folder is needed to write into.",
            fix="Name a folder; it is made if it is absent.",
        )
        return path

    def signing_key(self, name: str) -> SigningKey | None:
        """Return the key that the input holds."""
        value = self.values.get(name)
        return self.attempt(lambda: read_signing_key(value)) if value else None

    def model(self, name: str) -> RepoRef | None:
        """Return the model that the input names."""
        value = self.values.get(name)
        return self.attempt(lambda: read_reference(name, value, self.workspace)) if value else None

    def adapters(self, name: str) -> tuple[Weighted, ...]:
        """Return the adapters that the input names, one a line, each with its weight or None."""
        found: list[Weighted] = []
        for line in filter(None, map(str.strip, self.values.get(name, "").splitlines())):
            text, weight = self._split_weight(line)
            if weight is not None and (weight == 0 or not math.isfinite(weight)):
                self.add(
                    f"`{name}` gives {text!r} the weight {weight:g}.",
                    why="A weight is a finite number that is not zero; it may be negative.",
                    fix="Correct the weight, or leave the adapter out.",
                )
            ref = self.attempt(partial(read_reference, name, text, self.workspace))
            if ref is not None and any(ref == other for other, _ in found):
                self.add(
                    f"`{name}` names {text!r} twice.",
                    why="One adapter with both weights together is probably what is meant.",
                    fix="Write it once, with the sum of the weights.",
                )
            if ref is not None:
                found.append((ref, weight))
        return tuple(found)

    def _split_weight(self, line: str) -> tuple[str, float | None]:
        """Return a line's reference and weight; a line that is a folder's whole path has none."""
        words = line.rsplit(maxsplit=1)
        weight = _number(float, words[-1]) if words[1:] else None
        if weight is None or self.workspace.locate("adapter-path", line).exists():
            return line, None
        return words[0], weight

    def combination(self, adapters: Sequence[Weighted]) -> Combination | None:
        """Return how the adapters become one; None where there is one, and where something is wrong."""
        given = [name for name in COMBINATION_INPUTS if self.values.get(name)]
        if len(adapters) <= 1 and len(self.values.get("adapter-path", "").split("\n")) <= 1:
            self._check_alone(adapters, given)
            return None
        kind = self.values.get("combination", "")
        if not kind:
            self.add(
                "`adapter-path` names several adapters, and `combination` is missing.",
                why="Merging one after the other, adding the deltas and the other ways give different models, and none "
                "is taken silently.",
                fix=f"Set `combination` to one of: {', '.join(KINDS)}. `cat` is the exact weighted sum of the deltas.",
            )
            return None
        if kind not in KINDS:
            self.choice("combination")
            return None
        return Combination(
            kind=kind,
            weights=tuple(1.0 if weight is None else weight for _, weight in adapters),
            density=self._density(kind),
            seed=self._seed(kind),
            majority_sign=self._majority_sign(kind),
        )

    def _check_alone(self, adapters: Sequence[Weighted], given: Sequence[str]) -> None:
        for name in given:
            self.add(
                f"`{name}` is given, but `adapter-path` names one adapter.",
                why="There is nothing to combine, so it would be ignored.",
                fix=f"Remove `{name}`, or write one adapter a line.",
            )
        if any(weight is not None for _, weight in adapters):
            self.add(
                "`adapter-path` gives its one adapter a weight.",
                why="A weight is a part of a combination; one adapter is merged as it was trained.",
                fix="Remove the weight; to weaken an adapter on purpose, change `lora_alpha` in its config.",
            )

    def _density(self, kind: str) -> float | None:
        text = self._of_kinds("combination-density", kind, PRUNING, "prunes nothing")
        if text is None:
            return None
        if not text:
            self.add(
                f"`combination-density` is missing, and `combination` is `{kind}`.",
                why="This kind keeps a share of each adapter's values and drops the others; no share is good for all.",
                fix="Set it to a number in (0, 1], such as `0.5`.",
            )
            return None
        density = _number(float, text)
        if density is None or not 0 < density <= 1:
            self.add(
                f"`combination-density` is {text!r}.",
                why="It is the share of each adapter's values to keep, a number above 0 and at most 1.",
                fix="Set it to such a number, such as `0.5`.",
            )
        return density

    def _seed(self, kind: str) -> int | None:
        text = self._of_kinds("combination-seed", kind, RANDOM, "draws nothing at random")
        if text is None:
            return None
        seed = _number(int, text or "0")
        if seed is None or not 0 <= seed < 1 << 63:
            self.add(
                f"`combination-seed` is {text!r}.",
                why="It is a whole number from 0 to 2^63 - 1.",
                fix="Set it to such a number, or leave it out for 0.",
            )
        return seed

    def _majority_sign(self, kind: str) -> str | None:
        text = self._of_kinds("combination-majority-sign", kind, VOTING, "elects no sign")
        return None if text is None else self.choice("combination-majority-sign") if text else MAJORITIES[0]

    def _of_kinds(self, name: str, kind: str, kinds: Sequence[str], reason: str) -> str | None:
        """Return the input's text; None where this kind of combination has no use for it, and a problem if given."""
        text = self.values.get(name)
        if kind in kinds:
            return text
        if text:
            self.add(
                f"`{name}` is given, but `combination` is `{kind}`.",
                why=f"This kind {reason}, so it would be ignored.",
                fix=f"Remove it, or set `combination` to one of: {', '.join(kinds)}.",
            )
        return None

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

    def words(self, name: str) -> tuple[str, ...]:
        """Return the entries of a list, one a line or separated by commas, each once."""
        found = (word.strip() for word in re.split(r"[,\n]", self.values.get(name, "")))
        return tuple(dict.fromkeys(word for word in found if word))

    def allow(self, name: str) -> Allow:
        """Return what the input allows."""
        entries = self.words(name)
        for entry in entries:
            if reason := entry_problem(entry):
                self.add(f"`{name}` names {entry!r}.", why=f"{_capital(reason)}.", fix=f"Correct `{name}`.")
        names = [entry.partition("=")[0] for entry in entries]
        for twice in sorted({known for known in names if names.count(known) > 1}):
            self.add(
                f"`{name}` gives {twice!r} twice.", why="Only one value can be meant.", fix="Remove one of the two."
            )
        return Allow(entries=entries)

    def require(self, name: str, why: str, fix: str) -> None:
        """Note that an input is missing, unless something else was told about it."""
        if self.values.get(name) == "":
            self.add(f"`{name}` is missing.", why=why, fix=fix)


def _number(kind: Callable[[str], N], text: str) -> N | None:
    try:
        return kind(text)
    except ValueError:
        return None


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]

"""What the user allows by name: things that a run refuses unless somebody who knows why says so.

One list for all of them, so that a workflow shows at a glance what its releases are allowed to be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Name → what is allowed by it. A name that ends in "=" takes a value.
ALLOWANCES: Mapping[str, str] = MappingProxyType(
    {
        "pickle": "pickled weights, where there are no safetensors; tensors only, in a process without tokens",
        "not-verified": "publishing, marked as not verified, where a part of the judgement could not run",
        "value-head": "an adapter with a value head beside it, which scores texts and is not released",
        "same-repo": "a `target-repo` that is the repository, or lies in the folder, of the adapter or of the base",
        "peft=": "an adapter's config that means different weights to different releases of PEFT: read as this one did",
        "lost-biases": "an adapter whose trained biases are not in its file (PEFT up to 0.20): the base's are kept",
    }
)
_NEWEST_PEFT = "0.21"
_PEFT = re.compile(r"0\.([1-9]|1\d|2[01])(\.\d{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    """What is allowed.

    Attributes:
        entries: `name` or `name=value`, each name of `ALLOWANCES` at most once, in the order in which they were given.
    """

    entries: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        """Return whether `name` is allowed, whatever its value."""
        return any(entry.partition("=")[0] == name for entry in self.entries)

    def value(self, name: str) -> str | None:
        """Return the value that `name` is allowed with, or None where it is not allowed."""
        pairs = (entry.partition("=") for entry in self.entries)
        return next((value for key, _, value in pairs if key == name), None)


def forms() -> tuple[str, ...]:
    """Return how each name is written."""
    return tuple(f"{name}VALUE" if name.endswith("=") else name for name in ALLOWANCES)


def entry_problem(entry: str) -> str | None:
    """Return what is wrong with one entry, as a sentence without its full stop; None for a good one."""
    name, equals, value = entry.partition("=")
    if f"{name}{equals}" not in ALLOWANCES:
        return f"it must be one of: {', '.join(forms())}"
    if equals and not value:
        return "its value is missing"
    if name == "peft" and not _PEFT.fullmatch(value):
        return f"a release of PEFT is written as 0.13 or 0.13.2, and is at most {_NEWEST_PEFT}"
    return None

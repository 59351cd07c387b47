"""Which base an adapter says it was trained on, and what may be made of that.

What an adapter names is a hint. Only a plain `owner/name` on the Hub is followed; a path of the trainer's machine, a
quantised variant, or no name at all needs the user's `base-model`: which model was meant is never guessed. Whether the
base fits is not decided here, but by every tensor of the adapter (`runner.worker.model.attach`). No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from runner.files.adapter.folder import Adapter
from runner.protocol.errors import InputError, Problem
from runner.protocol.repo_ref import RepoRef
from runner.protocol.syntax import repo_id_problem

_QUANTISED = re.compile(
    r"(?:^|[-_./])(?:(?:bnb|nf|int|mxfp|nvfp|fp)[-_]?[48]|[48][-_]?bits?|gptq|awq|aqlm|hqq|exl[23]|gguf|quanto|w[48]a(?:8|16))"
    r"(?![a-z])",
    re.IGNORECASE,
)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)(?:/|$)")


def named_base(adapter: Adapter, revision: str | None) -> RepoRef:
    """Return the base that the adapter names.

    Args:
        adapter: the adapter.
        revision: the user's `base-revision`; else the one that the adapter states.

    Raises:
        InputError: it names none that can be followed without guessing.
    """
    name = adapter.base_model or ""
    shown = f"the adapter names {name[:120]!r}" if name else "the adapter names none"
    if is_quantised(name):
        raise _unknown(
            shown,
            why="That is a quantised variant by its name, and weights are merged into 16-bit or 32-bit ones. Which "
            "model it was made from is not guessed.",
            fix="Set `base-model` to the 16-bit model that it was made from; its model card names it.",
        )
    if repo_id_problem(name) is not None:
        raise _unknown(
            shown,
            why="Only a repository `owner/name` on the Hub can be followed; a path means nothing on this machine.",
            fix=f"Set `base-model` to the model that the adapter was trained on{_cached(name)}.",
        )
    stated = adapter.config.get("revision")
    return RepoRef(repo_id=name, revision=revision or (stated if isinstance(stated, str) and stated else None))


def is_quantised(name: str) -> bool:
    """Return whether a model's name says that its weights are quantised (`-bnb-4bit`, `-GPTQ`, `-AWQ`, `-FP8`, …)."""
    return _QUANTISED.search(name) is not None


def departures(adapters: Sequence[Adapter], base: RepoRef) -> tuple[str, ...]:
    """Return one sentence for each other base that the adapters name than the one they are merged into."""
    notes = []
    for name in dict.fromkeys(adapter.base_model for adapter in adapters if adapter.base_model):
        if name == base.repo_id:
            continue
        into = base.display if base.repo_id else "a local folder"
        note = f"The adapter names {name[:120]!r} as its base; it is merged into {into}."
        if is_quantised(name):
            note += " It was trained on quantised weights, which differ from those that the merge adds its change to."
        notes.append(note)
    return tuple(notes)


def _cached(name: str) -> str:
    found = _CACHED.search(name)
    return f"; the path is that of a cached copy of {found[1]}/{found[2]}" if found else ""


def _unknown(shown: str, *, why: str, fix: str) -> InputError:
    return InputError([Problem(what=f"`base-model` is not given, and {shown}.", why=why, fix=fix)])

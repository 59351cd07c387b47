"""Every file beside the weights, by one rule: the base's, the adapter's where it is its to bring, ours, or a failure.

Each file of a release has (a) the base's bytes, or (b) the adapter's, where it is the adapter's to bring (tokenizer,
templates, processor, generation config, modules of sentence-transformers, licences), or (c) was written for the release
and is named by it (`runner.judge.sidecars.manifest`); anything else is a failure, and so is each file of the base that
is missing, but for what no release carries (`runner.judge.sidecars.names`). Where loading gives the same object, other
bytes are a warning. The table is the judge's own: it knows nothing of how the files were chosen. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runner.files.layout import INDEX_FILE, Checkpoint
from runner.judge.sidecars.listing import Listing, canonical, json_of, list_folder, same_bytes, shown
from runner.judge.sidecars.manifest import ARCHIVE_FOLDER, CARD, Manifest, contradictions, is_document, read_manifest
from runner.judge.sidecars.names import (
    CONFIG,
    Kind,
    is_notice,
    is_weights,
    kind_of,
    module_folders,
    must_come_along,
)
from runner.judge.sidecars.resaved import generates_alike
from runner.judge.sidecars.speech import judge_speech
from runner.protocol.verdict import Check, Layer, Outcome

MAX_NAMED = 5  # problems in one check
_ADAPTERS_OWN = "adapter-"  # before the name of a licence, where the base has another of that name
_BOOKKEEPING = (".gitattributes", ".gitignore", ".git/", ".cache/huggingface/", ".huggingface/")
NAMES = {
    Kind.WEIGHTS: "no adapter and no second set of weights",
    Kind.TOKENIZER: "tokenizer and chat template are the base's or the adapter's",
    Kind.GENERATION: "the generation config is the base's or the adapter's",
    Kind.OTHER: "every other file is the base's, the adapter's or the release's own, and none is missing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One file that is not simply right.

    Attributes:
        path: of the file.
        kind: a key of `NAMES`, or `Kind.TEMPLATE`.
        said: what is wrong or noteworthy; it names the file.
        is_warning: whether loading gives the same.
    """

    path: str
    kind: Kind
    said: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """The folders of a case, listed."""

    base: Listing
    adapters: tuple[Listing, ...]
    merged: Listing
    weights: frozenset[str]
    modules: tuple[str, ...]
    manifest: Manifest

    @property
    def adapter(self) -> Listing:
        """The adapter whose files a release may take: the first one."""
        return self.adapters[0]


def judge_files(base: Path, adapters: Sequence[Path], merged: Checkpoint, *, rows: int | None) -> tuple[Check, ...]:
    """Return the checks of this layer; see `find_files` for the arguments."""
    findings = find_files(base, adapters, merged, rows=rows)
    return tuple(_check(kind, name, findings) for kind, name in NAMES.items())


def find_files(base: Path, adapters: Sequence[Path], merged: Checkpoint, *, rows: int | None) -> tuple[Finding, ...]:
    """Return every file of the merged folder that is not simply right, and every one that it lacks.

    Args:
        base: the base's folder.
        adapters: the adapters' folders, the one whose files a release may take first.
        merged: the merged folder, read.
        rows: the vocabulary's size where the adapter changes it, else None.
    """
    here = list_folder(merged.root)
    found = [
        Finding(path=path, kind=Kind.OTHER, said=f"{shown(path)} is {what}, no regular file")
        for path, what in here.odd.items()
    ]
    try:
        sides = _sides(base, adapters, merged, here)
        found += _compare(sides, rows)
    except OSError as error:
        name = str(error.filename or "a file")
        found.append(Finding(path=name, kind=Kind.OTHER, said=f"{shown(name)} cannot be read ({error.strerror})"))
    return tuple(found)


def _sides(base: Path, adapters: Sequence[Path], merged: Checkpoint, here: Listing) -> Sides:
    ours, theirs = list_folder(base), tuple(list_folder(adapter) for adapter in adapters)
    return Sides(
        base=ours,
        adapters=theirs,
        merged=here,
        weights=frozenset({file.name for file in merged.files} | ({INDEX_FILE} if merged.is_indexed else set())),
        modules=tuple({*module_folders(ours), *module_folders(theirs[0])}),
        manifest=read_manifest(here, ours),
    )


def _compare(sides: Sides, rows: int | None) -> Iterator[Finding]:
    speech, others = _groups(sides)
    for path, kind, said, is_warning in judge_speech(sides.base, sides.adapter, sides.merged, speech, rows=rows):
        yield Finding(path=path, kind=kind, said=said, is_warning=is_warning)
    for path in others:
        if (finding := _other(path, sides)) is not None:
            yield finding
    for path, said, is_whole in contradictions(sides.manifest, sides.merged):
        yield Finding(path=path, kind=Kind.OTHER, said=said, is_warning=is_whole)


def _groups(sides: Sides) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the paths of all sides that are about tokens and templates, and the others, sorted."""
    replaced = bool(module_folders(sides.adapter))  # the adapter's modules are the model, and the base's are not
    bases = [
        path
        for path in must_come_along(sides.base)
        if not is_document(path) and not (replaced and kind_of(path, sides.modules) is Kind.MODULE)
    ]
    must = {*bases, *_brought_modules(sides), *_notices(sides)}
    paths = {*must, *sides.merged.sizes} - sides.weights - {CONFIG}
    speech = {path for path in paths if kind_of(path, sides.modules) in (Kind.TOKENIZER, Kind.TEMPLATE)}
    return tuple(sorted(speech)), tuple(sorted(path for path in paths - speech if not _is_ours(path, sides)))


def _is_ours(path: str, sides: Sides) -> bool:
    """Return whether a file may be there whatever it holds: bookkeeping, and what the release's documents name."""
    if not is_document(path):
        return path.startswith(_BOOKKEEPING)
    if path.startswith(ARCHIVE_FOLDER) and path in sides.manifest.archive:
        name = path.rpartition("/")[2]
        is_told = name == CARD or is_notice(name)  # what its owner may have edited since
        return is_told or any(same_bytes(path, sides.merged, side, other=name) for side in sides.adapters)
    return sides.manifest.allows(path)


def _brought_modules(sides: Sides) -> tuple[str, ...]:
    """Return the files of sentence-transformers' modules that were trained and saved with the adapter."""
    modules = module_folders(sides.adapter)
    wanted = must_come_along(sides.adapter)
    return tuple(path for path in wanted if kind_of(path, modules) is Kind.MODULE)


def _notices(sides: Sides) -> tuple[str, ...]:
    """Return the names under which the adapter's licences are in the release."""
    names = [path for path in sides.adapter.sizes if is_notice(path)]
    clash = {name for name in names if name in sides.base and not same_bytes(name, sides.base, sides.adapter)}
    return tuple(f"{_ADAPTERS_OWN}{name}" if name in clash else name for name in names)


def _other(path: str, sides: Sides) -> Finding | None:
    """Return what is wrong with a file that is not about tokens, or None."""
    kind = kind_of(path, sides.modules)
    expected = _expected(path, kind, sides)
    reported = kind if kind in NAMES else Kind.OTHER
    if path not in sides.merged:
        return Finding(path=path, kind=reported, said=f"{shown(path)} is missing")
    for side, name in expected:
        if same_bytes(path, sides.merged, side, other=name):
            return None
    if kind is Kind.WEIGHTS or (not expected and is_weights(path)):
        said = f"{shown(path)} lies in the folder; a loader may take it for weights or an adapter"
        return Finding(path=path, kind=Kind.WEIGHTS, said=said)
    same = _holds_the_same(path, kind, expected, sides)
    if same:
        said = f"{shown(path)} has other bytes than the {_owner(expected, sides)}'s and holds the same"
    else:
        said = f"{shown(path)} is neither the base's nor the adapter's"
    return Finding(path=path, kind=reported, said=said, is_warning=same)


def _expected(path: str, kind: Kind, sides: Sides) -> tuple[tuple[Listing, str], ...]:
    """Return the files, by folder and path in it, of which one must be equal; () where none may be there."""
    if kind is Kind.WEIGHTS:
        return ()
    if kind is Kind.MODULE and path in sides.adapter:
        return ((sides.adapter, path),)  # trained with the adapter
    found = [(sides.base, path)] if path in sides.base else []
    if (
        kind in (Kind.GENERATION, Kind.PROCESSOR, Kind.NOTICE)
        and path in sides.adapter
        and not (found and is_notice(path))
    ):
        found.append((sides.adapter, path))
    own = path.removeprefix(_ADAPTERS_OWN)
    if own != path and is_notice(own) and own in sides.adapter:
        found.append((sides.adapter, own))
    return tuple(found)


def _holds_the_same(path: str, kind: Kind, expected: Iterable[tuple[Listing, str]], sides: Sides) -> bool:
    after = json_of(path, sides.merged) if path.endswith(".json") else None
    if after is None:
        return False
    wanted = [json_of(name, side) for side, name in expected]
    if kind is Kind.GENERATION and isinstance(after, dict):
        config = json_of(CONFIG, sides.merged)
        config = config if isinstance(config, dict) else {}
        return any(
            generates_alike(one, after, config) for one in wanted or [None] if one is None or isinstance(one, dict)
        )
    return any(one is not None and canonical(one) == canonical(after) for one in wanted)


def _owner(expected: Sequence[tuple[Listing, str]], sides: Sides) -> str:
    return "base" if expected[0][0] is sides.base else "adapter"


def _check(kind: Kind, name: str, findings: Sequence[Finding]) -> Check:
    about = (kind, Kind.TEMPLATE) if kind is Kind.TOKENIZER else (kind,)
    mine = [finding for finding in findings if finding.kind in about]
    failed = [finding.said for finding in mine if not finding.is_warning]
    said = failed or [finding.said for finding in mine]
    more = f"; and {len(said) - MAX_NAMED} more" if len(said) > MAX_NAMED else ""
    return Check(
        layer=Layer.FILES,
        name=name,
        outcome=Outcome.FAIL if failed else Outcome.WARN if mine else Outcome.PASS,
        detail=f"{'; '.join(said[:MAX_NAMED])}{more}." if said else "",
    )

"""Is the folder itself wrong? Files, headers, configuration, tokenizer: what structure failed, told by its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.checkpoint.layout import INDEX_FILE, Checkpoint, TensorInfo
from runner.verify.case import Case
from runner.verify.structure import TOKENIZER_FILES, VOCABULARIES, config_problems, read_json, stray_files
from runner.verify.verdict import MAX_NAMED, Cause, Diagnosis

TEMPLATES = ("chat_template.jinja", "chat_template.json")


def read_unreadable(folder: Path, problem: str) -> Diagnosis:
    """Return why a folder has no readable checkpoint; `problem` is what reading it said."""
    index = read_json(folder / INDEX_FILE) or {}
    names = index.get("weight_map") if isinstance(index.get("weight_map"), dict) else {}
    lost = sorted({str(file) for file in (names or {}).values() if not (folder / str(file)).is_file()})
    of_lost = [name for name, file in (names or {}).items() if file in lost]
    said = f"{len(lost)} of the index's files {'is' if len(lost) == 1 else 'are'} not there: {', '.join(lost[:3])}."
    return Diagnosis(
        kind=Cause.FILES,
        is_certain=True,
        evidence=said if lost else problem,
        tensors=tuple(sorted(of_lost)[:MAX_NAMED]),
        count=len(of_lost),
    )


def read_structure(case: Case, merged: Checkpoint) -> Iterator[Diagnosis]:
    """Yield what is wrong with names, shapes, dtypes, index, configuration and tokenizer."""
    yield from _tensors(case, merged)
    yield from _config(case, merged)
    yield from _tokenizer(case, merged.root)
    strays = stray_files(merged)
    if strays:
        told = f"A loader may take {', '.join(strays[:3])} for weights or an adapter, and apply it once more."
        yield Diagnosis(kind=Cause.STRAY_WEIGHTS, is_certain=True, evidence=told)


def _tensors(case: Case, merged: Checkpoint) -> Iterator[Diagnosis]:
    wanted = {**case.targets.optional, **case.targets.required}
    found = merged.tensors
    missing = [name for name in case.targets.required if name not in found]
    heads = [name for name in missing if case.targets.required[name].key in _untied(case)]
    if heads:
        told = "The adapter makes head and embedding differ, and only one of the two is stored."
        yield _about(Cause.HEAD_LOST, told, heads)
    rest = [name for name in missing if name not in heads]
    if rest:
        yield _about(Cause.TENSOR_MISSING, f"{len(rest)} tensors of the base are in no file.", rest)
    extra = [name for name in found if name not in wanted]
    if extra:
        yield _about(Cause.TENSOR_EXTRA, f"{len(extra)} tensors are stored that neither side has.", extra)
    shapes = [name for name, target in wanted.items() if name in found and found[name].shape != target.shape]
    if shapes:
        first = shapes[0]
        told = f"{first} is {list(found[first].shape)}, expected {list(wanted[first].shape)}."
        yield _about(Cause.SHAPE, told, shapes)
    dtypes = [name for name, target in wanted.items() if name in found and found[name].dtype != target.dtype]
    if dtypes:
        first = dtypes[0]
        told = f"{len(dtypes)} tensors are not in the dtype that was asked for: {_dtypes(found[first])}, expected "
        yield _about(Cause.DTYPE, f"{told}{wanted[first].dtype}.", dtypes)
    total = ((read_json(merged.root / INDEX_FILE) or {}).get("metadata") or {}).get("total_size")
    if merged.is_indexed and total is not None and total != merged.data_bytes and merged.data_bytes:
        base = ((read_json(case.base.root / INDEX_FILE) or {}).get("metadata") or {}).get("total_size")
        if total != base or case.base.data_bytes != merged.data_bytes:
            told = f"{INDEX_FILE} says {total} bytes, the tensors have {merged.data_bytes}."
            yield Diagnosis(kind=Cause.INDEX, is_certain=True, evidence=told)


def _dtypes(info: TensorInfo) -> str:
    return f"{info.name} is {info.dtype}"


def _untied(case: Case) -> set[str]:
    return set(case.targets.untied) | {case.blueprint.ties[key] for key in case.targets.untied}


def _config(case: Case, merged: Checkpoint) -> Iterator[Diagnosis]:
    before, after = read_json(case.base.root / "config.json") or {}, read_json(merged.root / "config.json")
    if after is None:
        yield Diagnosis(kind=Cause.CONFIG, is_certain=True, evidence="config.json is missing or no JSON object.")
        return
    problems = list(config_problems({**before, **case.config}, after, case.form(merged), ""))
    flags = [text for text in problems if "tie_word_embeddings" in text.split()[0]]
    if case.targets.untied and after.get("tie_word_embeddings", True) is not False:
        flags.append("tie_word_embeddings is not false, though head and embedding must differ")
    for kind, texts in ((Cause.TIE_FLAG, flags), (Cause.CONFIG, [t for t in problems if t not in flags])):
        if texts:
            yield Diagnosis(kind=kind, is_certain=True, evidence=f"config.json: {'; '.join(texts[:3])}.")


def _tokenizer(case: Case, folder: Path) -> Iterator[Diagnosis]:
    theirs = (case.base.root, case.adapter)
    changed = [name for name in sorted(TOKENIZER_FILES) if not _is_of_one(name, folder, theirs)]
    templates = [name for name in changed if name in TEMPLATES]
    if changed and not templates and changed == ["tokenizer_config.json"] and _only_template(folder, case.base.root):
        templates = changed
    others = [name for name in changed if name not in templates]
    if templates:
        told = f"{templates[0]} is neither the base's nor the adapter's, so that chats read otherwise."
        yield Diagnosis(kind=Cause.CHAT_TEMPLATE, is_certain=True, evidence=told)
    if others:
        told = f"{', '.join(others[:3])}: neither the base's nor the adapter's."
        yield Diagnosis(kind=Cause.TOKENIZER, is_certain=True, evidence=told)
    elif case.rows is not None and not templates and _is_of_the_base(folder, theirs):
        told = "The tokenizer is the base's, and the adapter's, which knows the tokens that it adds, is left aside."
        yield Diagnosis(kind=Cause.TOKENIZER, is_certain=True, evidence=told)
    elif not templates and _is_half(folder, theirs):
        told = "Half of the tokenizer's files are the base's, and half the adapter's."
        yield Diagnosis(kind=Cause.TOKENIZER, is_certain=True, evidence=told)
    if not _is_of_one("generation_config.json", folder, theirs):
        told = "generation_config.json is neither the base's nor the adapter's."
        yield Diagnosis(kind=Cause.GENERATION_CONFIG, is_certain=True, evidence=told)


def _only_template(folder: Path, base: Path) -> bool:
    ours, theirs = (read_json(root / "tokenizer_config.json") or {} for root in (folder, base))
    return {**ours, "chat_template": None} == {**theirs, "chat_template": None}


def _is_of_one(name: str, folder: Path, owners: Sequence[Path]) -> bool:
    return _read(folder / name) in {_read(owners[0] / name), _read(owners[1] / name) or _read(owners[0] / name)}


def _is_of_the_base(folder: Path, owners: Sequence[Path]) -> bool:
    mine, ours, theirs = ({name: _read(root / name) for name in TOKENIZER_FILES} for root in (folder, *owners))
    return mine == ours != theirs and any(theirs[name] is not None for name in VOCABULARIES)


def _is_half(folder: Path, owners: Sequence[Path]) -> bool:
    mine = {name: _read(folder / name) for name in TOKENIZER_FILES}
    return all(mine != {name: _read(owner / name) for name in TOKENIZER_FILES} for owner in owners) and any(
        (owners[1] / name).is_file() for name in VOCABULARIES
    )


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _about(kind: Cause, evidence: str, names: Sequence[str]) -> Diagnosis:
    return Diagnosis(
        kind=kind, is_certain=True, evidence=evidence, tensors=tuple(sorted(names)[:MAX_NAMED]), count=len(names)
    )

"""Is the folder itself wrong? Files, headers, configuration, tokenizer: what structure failed, told by its kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from runner.files.layout import INDEX_FILE, Checkpoint, TensorInfo
from runner.files.readable import folder_problem
from runner.judge.case import Case
from runner.judge.sidecars.files import find_files
from runner.judge.sidecars.names import Kind
from runner.judge.structure import config_problems, is_resaved, read_json
from runner.protocol.verdict import MAX_NAMED, Cause, Diagnosis

CAUSES = {
    Kind.TEMPLATE: Cause.CHAT_TEMPLATE,
    Kind.TOKENIZER: Cause.TOKENIZER,
    Kind.GENERATION: Cause.GENERATION_CONFIG,
    Kind.WEIGHTS: Cause.STRAY_WEIGHTS,
    Kind.OTHER: Cause.FILES,
}


def read_unreadable(folder: Path, problem: str) -> Diagnosis:
    """Return why a folder has no readable checkpoint; `problem` is what reading it said."""
    index = ({} if folder_problem(folder) else read_json(folder / INDEX_FILE)) or {}
    names = index.get("weight_map") if isinstance(index.get("weight_map"), dict) else {}
    there = {path.name for path in folder.iterdir() if path.is_file()}
    lost = sorted({str(file) for file in (names or {}).values()} - there)
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
    yield from _beside(case, merged)


def _tensors(case: Case, merged: Checkpoint) -> Iterator[Diagnosis]:
    wanted = {**case.targets.optional, **case.targets.required}
    found = merged.tensors
    missing, _ = case.form(merged).missing(found)
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
    metadata = (read_json(merged.root / INDEX_FILE) or {}).get("metadata")
    if merged.is_indexed and not isinstance(metadata, dict):
        told = f"{INDEX_FILE} has no object `metadata`; transformers cannot load the shards without it."
        yield Diagnosis(kind=Cause.INDEX, is_certain=True, evidence=told)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
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
    form, wanted = case.form(merged), {**before, **case.config}
    problems = list(config_problems(wanted, after, form, ""))
    if problems and is_resaved(wanted, after, form):
        problems = []
    flags = [text for text in problems if "tie_word_embeddings" in text.split()[0]]
    if case.targets.untied and after.get("tie_word_embeddings", True) is not False:
        flags.append("tie_word_embeddings is not false, though head and embedding must differ")
    for kind, texts in ((Cause.TIE_FLAG, flags), (Cause.CONFIG, [t for t in problems if t not in flags])):
        if texts:
            yield Diagnosis(kind=kind, is_certain=True, evidence=f"config.json: {'; '.join(texts[:3])}.")


def _beside(case: Case, merged: Checkpoint) -> Iterator[Diagnosis]:
    """Yield what is wrong beside the weights: one diagnosis for each kind of files, all named."""
    found = find_files(case.base.root, case.sides, merged, rows=case.rows)
    for kind, cause in CAUSES.items():
        said = [finding.said for finding in found if finding.kind is kind and not finding.is_warning]
        if said:
            more = f"; and {len(said) - MAX_NAMED} more" if len(said) > MAX_NAMED else ""
            yield Diagnosis(kind=cause, is_certain=True, evidence=f"{'; '.join(said[:MAX_NAMED])}{more}.")


def _about(kind: Cause, evidence: str, names: Sequence[str]) -> Diagnosis:
    return Diagnosis(
        kind=kind, is_certain=True, evidence=evidence, tensors=tuple(sorted(names)[:MAX_NAMED]), count=len(names)
    )

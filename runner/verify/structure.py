"""Structure: the merged folder is a whole checkpoint of the same model, and nothing else. Exact; no torch.

Checked: headers, index and totals agree; every expected tensor is there with its name, shape and dtype, and no other;
the tie flag is true to the tensors; config.json is the base's but for documented keys; tokenizer, chat template and
generation config are byte for byte the base's or the adapter's; no adapter and no second set of weights lies in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.checkpoint.layout import INDEX_FILE, Checkpoint, TensorInfo
from runner.syntax import parse_json
from runner.verify.verdict import Check, Layer, Outcome

DTYPE_KEYS = ("dtype", "torch_dtype")
# Written by whatever saved the folder last; no loader computes with them.
HARMLESS_KEYS = frozenset({"transformers_version", "_name_or_path"})
VOCABULARIES = frozenset(
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model".split()
)
TOKENIZER_FILES = VOCABULARIES | frozenset(
    "tokenizer_config.json special_tokens_map.json added_tokens.json merges.txt chat_template.jinja "
    "chat_template.json".split()
)
TEMPLATES = frozenset({"chat_template.jinja", "chat_template.json"})
OTHER_FILES = ("generation_config.json",)
_MISSING = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A tensor that the folder must, or may, hold."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the folder must look like.

    Attributes:
        required: tensors by stored name.
        optional: tensors that may be there.
        dtype: "auto", or the requested output dtype.
        is_untied: whether the base ties its embeddings and a right merge does not.
        may_untie: whether the tie flag may be false: `is_untied`, or both sides are stored though they are equal.
        rows: the vocabulary's size where the adapter changes it, else None.
        config: keys of config.json that must have these values: those of the class that the adapter's task needs.
    """

    required: Mapping[str, Wanted]
    optional: Mapping[str, Wanted]
    dtype: str
    is_untied: bool
    may_untie: bool
    rows: int | None
    config: Mapping[str, Any]


def judge_structure(*, base: Checkpoint, adapter: Path, merged: Checkpoint, form: Form) -> Iterator[Check]:
    """Yield the checks of this layer, in a fixed order.

    Args:
        base: the base, read.
        adapter: the adapter's folder.
        merged: the merged folder, read; that this was possible is itself a check of the caller's.
        form: what is expected.
    """
    yield _tensors(merged.tensors, form)
    yield _totals(base, merged)
    yield _strays(merged)
    yield _config(base.root, merged.root, form)
    yield _tie_flag(base.root, merged, form)
    yield _tokenizer(base.root, adapter, merged.root, form)
    yield _other_files(base.root, adapter, merged.root)


def _tensors(found: Mapping[str, TensorInfo], form: Form) -> Check:
    known = {**form.optional, **form.required}
    problems = [f"{name} is missing" for name in form.required if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in known]
    for name, wanted in known.items():
        if name in found and found[name].shape != wanted.shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, expected {list(wanted.shape)}")
        elif name in found and found[name].dtype != wanted.dtype:
            problems.append(f"{name} is {found[name].dtype}, expected {wanted.dtype}")
    return _check("every tensor has its name, shape and dtype, and none is extra", problems, limit=0)


def _totals(base: Checkpoint, merged: Checkpoint) -> Check:
    name = "index and headers agree"
    if not merged.is_indexed:
        return _check(name, [])
    total = _total_size(merged.root)
    inherited = _total_size(base.root) if base.is_indexed and base.data_bytes == merged.data_bytes else _MISSING
    if total in (_MISSING, merged.data_bytes) or total == inherited:
        return _check(name, [])
    return _check(name, [f"{INDEX_FILE} says total_size {total}, the tensors have {merged.data_bytes} bytes"])


def _total_size(root: Path) -> Any:
    metadata = parse_json((root / INDEX_FILE).read_bytes()).get("metadata") or {}
    return metadata.get("total_size", _MISSING)


def stray_files(merged: Checkpoint) -> list[str]:
    """Return what lies beside the weights and may be taken for weights or an adapter."""
    mine = {file.name for file in merged.files} | ({INDEX_FILE} if merged.is_indexed else set())
    weights = ("*.safetensors", "*.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "pytorch_model*", "adapter_*")
    return sorted({path.name for pattern in weights for path in merged.root.glob(pattern)} - mine)


def _strays(merged: Checkpoint) -> Check:
    names = stray_files(merged)
    problems = [f"{name} lies in the folder; a loader may take it for weights or an adapter" for name in names]
    return _check("no adapter and no second set of weights", problems)


def _config(base: Path, merged: Path, form: Form) -> Check:
    name = "config.json is the base's but for documented keys"
    before, after = read_json(base / "config.json"), read_json(merged / "config.json")
    if after is None:
        return _check(name, ["config.json is missing or not a JSON object"])
    return _check(name, list(config_problems({**(before or {}), **form.config}, after, form, "")))


def config_problems(before: Mapping[str, Any], after: Mapping[str, Any], form: Form, path: str) -> Iterator[str]:
    """Yield what is wrong with a config; `before` is what it must be but for documented keys, `path` of both."""
    for key in sorted({*before, *after} - HARMLESS_KEYS):
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        if key in DTYPE_KEYS or (old == new and not (key == "vocab_size" and form.rows is not None)):
            continue
        if key in ("text_config", "llm_config") and isinstance(old, dict) and isinstance(new, dict):
            yield from config_problems(old, new, form, f"{path}{key}.")
        elif not _may_change(key, new, form):
            expected = form.rows if key == "vocab_size" and form.rows is not None else old
            yield f"{path}{key} is {_show(new)}, expected {_show(expected)}"

    old_dtype, new_dtype = _dtype(before), _dtype(after)
    wanted = old_dtype if form.dtype == "auto" else form.dtype
    if new_dtype != wanted and not (new_dtype is None and old_dtype is None):
        yield f"{path}dtype is {_show(new_dtype)}, expected {_show(wanted)}; loaders cast to what it says"


def _dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype that the config names, under the new key or the old one."""
    value = next((config[key] for key in DTYPE_KEYS if config.get(key) is not None), None)
    return None if value is None else str(value).removeprefix("torch.")


def _may_change(key: str, new: Any, form: Form) -> bool:
    if key == "tie_word_embeddings":
        return form.may_untie and new is False
    if key == "vocab_size":
        return form.rows is not None and new == form.rows
    return key == "quantization_config" and new is _MISSING


def _tie_flag(base: Path, merged: Checkpoint, form: Form) -> Check:
    name = "the tie flag is true to the tensors"
    before, after = read_json(base / "config.json") or {}, read_json(merged.root / "config.json") or {}
    if form.is_untied:
        wrong = [path for path, value in _ties(after) if value is not False]
        said = any(value is False for _, value in _ties(after))
        problems = [f"{path} is true, but the two embeddings must differ" for path in wrong]
        if not wrong and not said:
            problems = ["tie_word_embeddings must be false, because the two embeddings must differ"]
        return _check(name, problems)
    loosened = form.may_untie and not any(value for _, value in _ties(after))
    changed = not loosened and dict(_ties(before)) != dict(_ties(after))
    return _check(name, ["tie_word_embeddings is not the base's, and the adapter unties nothing"] if changed else [])


def _ties(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for holder, prefix in ((config, ""), (config.get("text_config"), "text_config.")):
        if isinstance(holder, dict) and "tie_word_embeddings" in holder:
            yield f"{prefix}tie_word_embeddings", holder["tie_word_embeddings"]


def _tokenizer(base: Path, adapter: Path, merged: Path, form: Form) -> Check:
    found, ours, theirs = (_files(root, TOKENIZER_FILES) for root in (merged, base, adapter))
    name = "tokenizer and chat template are the base's or the adapter's, byte for byte"
    has_own = bool(theirs.keys() & VOCABULARIES)
    if has_own and form.rows is not None and found == ours != theirs:
        return _check(name, ["they are the base's, which do not know the tokens that the adapter adds"])
    templates = {file: data for file, data in theirs.items() if file in TEMPLATES}
    if not has_own and templates:  # a template that the adapter was trained with, for the base's tokenizer
        theirs = {file: data for file, data in ours.items() if file not in TEMPLATES} | templates
    if found in (ours, theirs if has_own or templates else ours):
        return _check(name, [])
    if has_own and all(data in (ours.get(file), theirs.get(file)) for file, data in found.items()):
        return _check(name, ["half of the tokenizer's files are the base's and half are the adapter's"])
    problems = []
    for file in sorted({*found, *ours}):
        if found.get(file) != ours.get(file):
            state = "missing" if file not in found else "changed" if file in ours else "not expected"
            problems.append(f"{file} is {state}")
    return _check(name, problems)


def _other_files(base: Path, adapter: Path, merged: Path) -> Check:
    problems = []
    found, ours, theirs = (_files(root, OTHER_FILES) for root in (merged, base, adapter))
    for name in OTHER_FILES:
        if name not in found and name in ours:
            problems.append(f"{name} is missing")
        elif name in found and found[name] not in (ours.get(name), theirs.get(name)):
            problems.append(f"{name} is neither the base's nor the adapter's")
    return _check("the generation config is the base's or the adapter's, byte for byte", problems)


def _files(root: Path, names: frozenset[str] | tuple[str, ...]) -> dict[str, bytes]:
    return {name: (root / name).read_bytes() for name in names if (root / name).is_file()}


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None where there is none."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _show(value: Any) -> str:
    return "absent" if value is _MISSING else json.dumps(value)[:80]


def _check(name: str, problems: list[str], limit: float | None = None) -> Check:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(
        layer=Layer.STRUCTURE,
        name=name,
        outcome=Outcome.FAIL if problems else Outcome.PASS,
        value=float(len(problems)) if limit is not None else None,
        limit=limit,
        detail=f"{problems[0]}{more}." if problems else "",
    )

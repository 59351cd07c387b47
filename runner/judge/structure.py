"""Structure: the merged folder is a whole checkpoint of the same model. Exact; no torch.

Checked: headers, index and totals agree; every expected tensor is there with its name, shape and dtype, and no other;
the tie flag is true to the tensors; config.json is the base's but for documented keys. What lies beside the weights is
the matter of `runner.judge.sidecars.files`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runner.files.layout import INDEX_FILE, Checkpoint
from runner.judge.sidecars.resaved import loads_alike
from runner.protocol.syntax import parse_json
from runner.protocol.verdict import Check, Layer, Outcome

DTYPE_KEYS = ("dtype", "torch_dtype")
NESTED_CONFIGS = ("text_config", "llm_config")
FLOAT_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Written by whatever saved the folder last; no loader computes with them.
HARMLESS_KEYS = frozenset({"transformers_version", "_name_or_path"})
SAME_WHEN_LOADED = "; transformers makes the same config of both"
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
        may_lack: tensors that loading does not need → those of which one must be there instead, or none at all.
    """

    required: Mapping[str, Wanted]
    optional: Mapping[str, Wanted]
    dtype: str
    is_untied: bool
    may_untie: bool
    rows: int | None
    config: Mapping[str, Any]
    may_lack: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def missing(self, found: Collection[str]) -> tuple[list[str], list[str]]:
        """Return the required names that `found` lacks: those that loading needs, and those that it does not."""
        lost = [name for name in self.required if name not in found]
        needless = [name for name in lost if name in self.may_lack and self._has_instead(name, found)]
        return [name for name in lost if name not in needless], needless

    def _has_instead(self, name: str, found: Collection[str]) -> bool:
        others = self.may_lack[name]
        return not others or any(other in found for other in others)


def judge_structure(*, base: Checkpoint, merged: Checkpoint, form: Form) -> Iterator[Check]:
    """Yield the checks of this layer, in a fixed order.

    Args:
        base: the base, read.
        merged: the merged folder, read; that this was possible is itself a check of the caller's.
        form: what is expected.
    """
    yield _tensors(merged, form)
    yield _totals(base, merged)
    yield _config(base.root, merged.root, form)
    yield _tie_flag(base.root, merged, form)


def _tensors(merged: Checkpoint, form: Form) -> Check:
    found, known = merged.tensors, {**form.optional, **form.required}
    missing, needless = form.missing(found)
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} is not expected" for name in found if name not in known]
    for name, wanted in known.items():
        if name in found and found[name].shape != wanted.shape:
            problems.append(f"{name} has shape {list(found[name].shape)}, expected {list(wanted.shape)}")
        elif name in found and found[name].dtype != wanted.dtype:
            problems.append(f"{name} is {found[name].dtype}, expected {wanted.dtype}")
    name = "every tensor has its name, shape and dtype, and none is extra"
    check = _check(name, problems, limit=0)
    told = "; ".join(_equal_when_loaded(merged, needless))
    return replace(check, outcome=Outcome.WARN, detail=f"{told}.") if told and not problems else check


def _equal_when_loaded(merged: Checkpoint, needless: Sequence[str]) -> Iterator[str]:
    """Yield how the tensors differ from the base's though transformers loads the same."""
    renamed = [info.name for file in merged.files for info in file.tensors if info.name not in merged.tensors]
    if renamed:
        yield f"{len(renamed)} tensors have another name than in the base, the first {renamed[0]}, and load as the same"
    if needless:
        yield f"{len(needless)} tensors are left out that loading does not need, the first {needless[0]}"


def _totals(base: Checkpoint, merged: Checkpoint) -> Check:
    name = "index and headers agree"
    if not merged.is_indexed:
        return _check(name, [])
    if not isinstance((read_json(merged.root / INDEX_FILE) or {}).get("metadata"), dict):
        return _check(name, [f"{INDEX_FILE} has no `metadata`, without which transformers cannot load the shards"])
    total = _total_size(merged.root)
    inherited = _total_size(base.root) if base.is_indexed and base.data_bytes == merged.data_bytes else _MISSING
    if total in (_MISSING, merged.data_bytes) or total == inherited:
        return _check(name, [])
    return _check(name, [f"{INDEX_FILE} says total_size {total}, the tensors have {merged.data_bytes} bytes"])


def _total_size(root: Path) -> Any:
    metadata = parse_json((root / INDEX_FILE).read_bytes()).get("metadata") or {}
    return metadata.get("total_size", _MISSING)


def _config(base: Path, merged: Path, form: Form) -> Check:
    name = "config.json is the base's but for documented keys"
    before, after = read_json(base / "config.json"), read_json(merged / "config.json")
    if after is None:
        return _check(name, ["config.json is missing or not a JSON object"])
    wanted = {**(before or {}), **form.config}
    problems = list(config_problems(wanted, after, form, ""))
    return _check(name, problems, is_harmless=bool(problems) and is_resaved(wanted, after, form))


def is_resaved(before: Mapping[str, Any], after: Mapping[str, Any], form: Form) -> bool:
    """Return whether a config that is not literally what it must be is so once it is loaded."""
    return not any(_dtype_problems(before, after, form, "")) and loads_alike(_edited(before, after, form), after)


def _edited(before: Mapping[str, Any], after: Mapping[str, Any], form: Form) -> dict[str, Any]:
    """Return the config with every documented change that `after` has, and with the rows that it must have."""
    made = dict(before)
    if form.rows is not None and "vocab_size" in made:
        made["vocab_size"] = form.rows
    for key in {"tie_word_embeddings", "vocab_size", "quantization_config"} & {*before, *after}:
        if key in after and _may_change(key, after[key], form):
            made[key] = after[key]
        elif key not in after and _may_change(key, _MISSING, form):
            made.pop(key, None)
    for key in NESTED_CONFIGS:
        if isinstance(made.get(key), dict) and isinstance(after.get(key), dict):
            made[key] = _edited(made[key], after[key], form)
    return made


def config_problems(before: Mapping[str, Any], after: Mapping[str, Any], form: Form, path: str) -> Iterator[str]:
    """Yield what is wrong with a config; `before` is what it must be but for documented keys, `path` of both."""
    yield from _key_problems(before, after, form, path)
    yield from _dtype_problems(before, after, form, path)


def _key_problems(before: Mapping[str, Any], after: Mapping[str, Any], form: Form, path: str) -> Iterator[str]:
    for key in sorted({*before, *after} - HARMLESS_KEYS):
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        if key in DTYPE_KEYS or (old == new and not (key == "vocab_size" and form.rows is not None)):
            continue
        if key in NESTED_CONFIGS and isinstance(old, dict) and isinstance(new, dict):
            yield from _key_problems(old, new, form, f"{path}{key}.")
        elif not _may_change(key, new, form):
            expected = form.rows if key == "vocab_size" and form.rows is not None else old
            yield f"{path}{key} is {_show(new)}, expected {_show(expected)}"


def _dtype_problems(before: Mapping[str, Any], after: Mapping[str, Any], form: Form, path: str) -> Iterator[str]:
    for key in NESTED_CONFIGS:
        if isinstance(before.get(key), dict) and isinstance(after.get(key), dict):
            yield from _dtype_problems(before[key], after[key], form, f"{path}{key}.")
    old_dtype, new_dtype = _dtype(before), _dtype(after)
    wanted = old_dtype if form.dtype == "auto" else form.dtype
    if wanted is None and new_dtype == _stored_dtype(form):
        return  # what loaders find in the files where the config says nothing
    if new_dtype != wanted and not (new_dtype is None and old_dtype is None):
        yield f"{path}dtype is {_show(new_dtype)}, expected {_show(wanted)}; loaders cast to what it says"


def _stored_dtype(form: Form) -> str | None:
    """Return the one dtype that all floats of a right merge are stored in, or None."""
    found = {tensor.dtype for tensor in form.required.values()} & FLOAT_NAMES.keys()
    return FLOAT_NAMES[found.pop()] if len(found) == 1 else None


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


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None where there is none."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _show(value: Any) -> str:
    return "absent" if value is _MISSING else json.dumps(value)[:80]


def _check(name: str, problems: list[str], limit: float | None = None, *, is_harmless: bool = False) -> Check:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return Check(
        layer=Layer.STRUCTURE,
        name=name,
        outcome=Outcome.WARN if is_harmless else Outcome.FAIL if problems else Outcome.PASS,
        value=float(len(problems)) if limit is not None else None,
        limit=limit,
        detail=f"{problems[0]}{more}{SAME_WHEN_LOADED if is_harmless else ''}." if problems else "",
    )

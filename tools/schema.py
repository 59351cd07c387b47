"""docs/report.schema.json: the JSON Schema of report.json, from the dataclasses that it is made of.

Written by `python -m tools.tables`; never by hand. Types come from the annotations, descriptions from the `Attributes:`
of the docstrings. A reader should ignore fields that it does not know: new ones may come with any version of the
action, while `schema_version` changes when one goes or gets another meaning.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from runner.protocol.digests import MergedCheckpoint
from runner.protocol.errors import Problem
from runner.protocol.plan_summary import PlanSummary
from runner.protocol.verdict import Verdict
from runner.supervisor.inputs.declared import INPUTS
from runner.supervisor.inputs.former import REPORTED
from runner.supervisor.report.files import SCHEMA_VERSION, Report

_ATTRIBUTE = re.compile(r"^    (?P<name>\w+): (?P<text>.*(?:\n      .*)*)", re.MULTILINE)
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    Path: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"anyOf": [{"type": "number"}, {"enum": ["nan", "inf", "-inf"]}]},
}
_DIGEST = {"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"}
Schema = dict[str, Any]


def render_schema() -> str:
    """Return the schema as JSON text."""
    outputs = Report(inputs_public={}, versions={}).outputs()
    merged = _of_class(MergedCheckpoint)
    del merged["properties"]["root"]  # a path of the machine
    merged["properties"]["digest"] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    merged["required"] = [*(name for name in merged["required"] if name != "root"), "digest"]
    texts = {name: {"type": "string"} for name in ("repo_id", "tag", "commit", "url")}
    created = {"type": "boolean", "description": "Whether this run wrote it."}
    page = {"type": ["string", "null"], "description": "Of the pull request that it is; null for a tagged release."}
    release = _object({**texts, "created": created, "pull_request": page})
    shown = [spec.name for spec in INPUTS if not spec.secret]
    phase = _object({"name": {"type": "string"}, "wall_s": _of(float)})
    properties = {
        "schema_version": {"const": SCHEMA_VERSION},
        "outputs": _object({name: {"type": "string"} for name in outputs}),
        "inputs": {
            "type": "object",
            "description": "Every input that may be shown; empty where they could not be read.",
            "properties": {name: {"type": ["string", "boolean", "integer"]} for name in (*shown, *REPORTED)},
        },
        "base_revision": {"type": ["string", "null"], "description": "Commit of the base; null for a local folder."},
        "adapter_digest": _DIGEST,
        "merged_digest": _DIGEST,
        "plan": _or_null(_of_class(PlanSummary)),
        "merged": _or_null(merged),
        "verdict": _or_null(_of_class(Verdict)),
        "release": _or_null(release),
        "problems": {"type": "array", "items": _of_class(Problem)},
        "phases": {"type": "array", "items": phase},
        "versions": {"type": "object", "additionalProperties": {"type": "string"}},
    }
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "report.json of lora-merge-action",
        "description": "Parts that the run did not reach are null or empty. A number that is not finite is a text.",
        **_object(properties),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def strict(schema: Any) -> Any:
    """Return the schema with no room for a field that it does not name, for tests of our own reports."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if "properties" in made and made.get("type") == "object":
        made.setdefault("additionalProperties", False)
    return made


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "required": list(properties), "properties": dict(properties)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _of(kind: Any) -> Schema:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _or_null(_of(inner))
    if origin is tuple:
        return {"type": "array", "items": _of(arguments[0])}
    if origin is not None:
        return {"type": "object", "additionalProperties": _of(arguments[1])}
    if dataclasses.is_dataclass(kind):
        return _of_class(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"enum": [member.value for member in kind]}
    return dict(_PLAIN[kind])


def _of_class(kind: Any) -> Schema:
    """Return the schema of a dataclass: every field, with what its docstring says of it."""
    documentation = inspect.cleandoc(kind.__doc__ or "")
    said = {found["name"]: " ".join(found["text"].split()) for found in _ATTRIBUTE.finditer(documentation)}
    properties = {}
    for name, hint in get_type_hints(kind).items():
        properties[name] = {**_of(hint), **({"description": said[name]} if name in said else {})}
    return {"description": documentation.partition("\n")[0], **_object(properties)}

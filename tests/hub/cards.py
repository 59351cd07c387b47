"""Model cards: the YAML front matter of README.md, read and judged as the Hub does."""

from __future__ import annotations

import re
from typing import Any

import yaml

_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)(?:^|\r?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]+)?|code|multilingual")
_RELATIONS = ("adapter", "merge", "quantized", "finetune")


def front_matter(text: str) -> dict[str, Any] | None:
    """Return the metadata of a card, None where it has none; raises `yaml.YAMLError` or ValueError for bad ones."""
    found = _FRONT.match(text)
    if found is None:
        return None
    data = yaml.safe_load(found.group(1))
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError("YAML metadata must be a mapping")
    return data


def judge(text: str) -> tuple[list[str], list[str]]:
    """Return errors and warnings about a card."""
    try:
        data = front_matter(text)
    except (yaml.YAMLError, ValueError) as error:
        return [f"Invalid YAML metadata: {' '.join(str(error).split())}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        *_texts(data, "base_model", _REPO_ID, "a valid model id"),
        *_texts(data, "datasets", _REPO_ID, "a valid dataset id"),
        *_texts(data, "language", _LANGUAGE, "an ISO 639 code"),
        *_texts(data, "license", re.compile(r"[a-z0-9.-]+"), "a licence identifier"),
        *_texts(data, "tags", re.compile(r".{1,200}"), "a string"),
        *_single(data, ("license", "license_name", "license_link", "pipeline_tag", "library_name")),
    ]
    relation = data.get("base_model_relation")
    if relation is not None and relation not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of {list(_RELATIONS)}')
    if "tags" in data and not isinstance(data["tags"], list):
        errors.append('"tags" must be an array')
    warnings = [] if "license" in data else ["no license in the yaml metadata of the repo card"]
    return errors, warnings


def _texts(data: dict[str, Any], key: str, wanted: re.Pattern[str], what: str) -> list[str]:
    values = data.get(key, [])
    values = values if isinstance(values, list) else [values]
    return [
        f'"{key}" with value {value!r} is not {what}'
        for value in values
        if not isinstance(value, str) or not wanted.fullmatch(value)
    ]


def _single(data: dict[str, Any], keys: tuple[str, ...]) -> list[str]:
    return [f'"{key}" must be a string' for key in keys if key in data and isinstance(data[key], list | dict)]

"""The parity suites, read by import: what tests/parity/test_*.py merges, without running any of it.

A suite lists its cases in a mapping `CASES`: name → an object with `config` (a PEFT config) and `build` (returns the
model) or `architecture` (a class of transformers, built by tests.parity.structures). Other attributes are shown as they
are. A suite without `CASES` is listed by its tests.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedModel

from tests.parity import structures

ROOT = Path(__file__).resolve().parent.parent
_QUIET_FIELDS = frozenset(
    """task_type inference_mode peft_type auto_mapping peft_version base_model_name_or_path revision target_modules r
    lora_alpha fan_in_fan_out runtime_config layers_pattern init_r total_step""".split()
)
_SHOWN = 6  # values of a parameter that are listed before the count


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """One test module.

    Attributes:
        file: relative to the repository.
        title: first line of its docstring.
        cases: its `CASES`; empty where it has none.
        tests: each test as (its name as a sentence, its parameters apart from the case).
    """

    file: str
    title: str
    cases: Mapping[str, Any]
    tests: tuple[tuple[str, str], ...]


def read_suites() -> tuple[Suite, ...]:
    """Return every suite of tests/parity, by file name."""
    return tuple(_read(path) for path in sorted((ROOT / "tests" / "parity").glob("test_*.py")))


def builder(case: Any) -> Callable[[], PreTrainedModel] | None:
    """Return what builds the case's model, or None where the suite builds it in its own way."""
    if isinstance(architecture := getattr(case, "architecture", None), str):
        return lambda: structures.build(architecture)
    build: Callable[[], PreTrainedModel] | None = getattr(case, "build", None)
    return build


def describe_tuner(case: Any) -> str:
    """Return the method and the options that are not its defaults."""
    config = getattr(case, "config", None)
    if not isinstance(config, PeftConfig):
        parts = [f"{name}={value}" for name, value in _fields(case) if isinstance(value, str | int) and value]
        return ", ".join(parts) or "–"
    return f"{config.peft_type.value}{_options(config)}"


def describe_structure(case: Any) -> str:
    """Return the model's class, and whether its embeddings are tied."""
    if isinstance(architecture := getattr(case, "architecture", None), str):
        return architecture
    build = builder(case)
    return _built(build) if build else "–"


def describe_dtype(case: Any) -> str:
    """Return the dtype of the base where the case has one of its own."""
    return str(getattr(case, "dtype", "") or "").removeprefix("torch.")


def _read(path: Path) -> Suite:
    module = importlib.import_module(f"tests.parity.{path.stem}")
    return Suite(
        file=str(path.relative_to(ROOT)),
        title=(module.__doc__ or path.stem).strip().splitlines()[0],
        cases=getattr(module, "CASES", {}),
        tests=tuple(_tests(module)),
    )


def _tests(module: ModuleType) -> Iterator[tuple[str, str]]:
    cases = getattr(module, "CASES", {})
    for name, test in vars(module).items():
        if not name.startswith("test_"):
            continue
        parameters = []
        for mark in getattr(test, "pytestmark", ()):
            if mark.name == "parametrize":
                names, values = mark.args[0], list(mark.args[1])
                parameters.append("each case" if cases and values == list(cases) else f"{names}: {_values(values)}")
        yield name.removeprefix("test_").replace("_", " "), "; ".join(reversed(parameters))


def _values(values: list[Any]) -> str:
    if not all(isinstance(value, str | int | float) or str(value).startswith("torch.") for value in values):
        return f"{len(values)} values"
    shown = ", ".join(str(value).removeprefix("torch.") for value in islice(values, _SHOWN))
    return shown if len(values) <= _SHOWN else f"{shown}, … ({len(values)})"


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            yield from _fields(inner) if dataclasses.is_dataclass(inner) else ((field.name, inner),)


def _options(config: PeftConfig) -> str:
    shown = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name in _QUIET_FIELDS or value == default or not field.init:
            continue
        scalar = isinstance(value, str | int | float) and value is not True
        shown.append(f"{field.name}={value}" if scalar else field.name)
    return f" ({', '.join(shown)})" if shown else ""


@cache
def _built(build: Callable[[], PreTrainedModel]) -> str:
    model = build()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return type(model).__name__ + (", tied" if tied else "")

"""An adapter that was trained on a half of the model: on its text model alone, say, and not on what has pictures, too.

Such an adapter names modules from the half's own root (`layers.0…`), or as the half's class for causal language models
does (`model.layers.0…`); in the whole model they lie below the path of the half (`model.language_model.layers.0…`).

Promised: a reading places every module, and it is the only one that does; of several, none is taken.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from runner.protocol.errors import AdapterMismatch

PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"


def read_half(model: PreTrainedModel, strange: Collection[str]) -> Mapping[str, str]:
    """Return path in the adapter → path in the model for every module of the half that the adapter was trained on.

    Args:
        model: the whole model; may be on the meta device.
        strange: module paths of the adapter that the model does not have.

    Returns:
        An empty mapping where no half of the model has all of them.

    Raises:
        AdapterMismatch: several halves have all of them.
    """
    if not strange:
        return {}
    paths = {path for path, _ in model.named_modules()}
    leaves = _leaves(model)
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for prefix, half in _readings(model):
        table = _table(paths, prefix, half) | _head(model, half)
        placed = [_place(table, leaves, module) for module in sorted(strange)]
        if all(placed):
            known = dict(zip(sorted(strange), map(str, placed), strict=True))
            found.setdefault(tuple(map(str, placed)), table | known)
    if len(found) > 1:
        raise _ambiguous(min(strange), sorted(places[0] for places in found))
    return next(iter(found.values()), {})


def unplaced(model: PreTrainedModel, modules: Collection[str]) -> set[str]:
    """Return which module paths the model has not, nor a module without parts (such as fused experts) above them."""
    own = {path: path for path, _ in model.named_modules()}
    leaves = _leaves(model)
    return {module for module in modules if module and not _place(own, leaves, module)}


def outer_half(model: PreTrainedModel, targets: Collection[str]) -> str | None:
    """Return the path of the outermost half of the model that has all of the `targets`, or None."""
    inside = (path for path, _ in _halves(model) if all(target.startswith(f"{path}.") for target in targets))
    return min(inside, key=len, default=None) if targets else None


def targets_in(model: PreTrainedModel, config: Mapping[str, Any], paths: Mapping[str, str]) -> set[str]:
    """Return the modules that the config's targets mean, by PEFT's own rule.

    Args:
        model: the whole model.
        config: adapter_config.json.
        paths: the modules in question: path that the config is held against → path in the model.
    """
    if config.get("target_modules") == ALL_LINEAR:
        modules = dict(model.named_modules())
        head = model.get_output_embeddings()
        linear = {new for new in paths.values() if isinstance(modules.get(new), nn.Linear | Conv1D)}
        return {new for new in linear if modules[new] is not head}
    wanted = SimpleNamespace(target_parameters=None, **_matching(config))
    return {new for old, new in paths.items() if check_target_module_exists(wanted, old) and new}


def _leaves(model: PreTrainedModel) -> set[str]:
    return {path for path, module in model.named_modules() if not any(True for _ in module.children())}


def _matching(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    targets = config.get("target_modules")
    return {"target_modules": targets or (), **{field: config.get(field) for field in fields}}


def _halves(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the models inside the model that have a config of their own."""
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and type(module.config) is not type(model.config):
            yield path, module


def _readings(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """Yield (path in the adapter, path in the model) of what both call by different names."""
    text = type(model.config.get_text_config())
    causal = AutoModelForCausalLM._model_mapping
    for path, half in _halves(model):
        yield "", path
        prefixes = {half.base_model_prefix, "model"} if isinstance(half.config, text) else set()
        if type(half.config) in causal:
            prefixes.add(causal[type(half.config)].base_model_prefix)
        yield from ((prefix, path) for prefix in sorted(prefixes - {""}))


def _table(paths: Collection[str], prefix: str, half: str) -> dict[str, str]:
    """Return path in the adapter → path in the model, of every module below `half`."""
    below = (path for path in paths if path.startswith(f"{half}."))
    return {f"{prefix}{path[len(half) :]}".removeprefix("."): path for path in below}


def _head(model: PreTrainedModel, half: str) -> dict[str, str]:
    """Return the output embeddings, where they lie outside the half: the half's class has them at its root."""
    head = model.get_output_embeddings()
    path = next((path for path, module in model.named_modules() if module is head), "") if head is not None else ""
    return {path.rpartition(".")[2]: path} if path and not path.startswith(f"{half}.") else {}


def _place(table: Mapping[str, str], leaves: Collection[str], module: str) -> str | None:
    """Return the module's path in the model: found itself, or inside a module that has no parts."""
    if module in table:
        return table[module]
    parts = module.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found = table.get(".".join(parts[:count]))
        if found is not None:
            return ".".join((found, *parts[count:])) if found in leaves else None
    return None


def _ambiguous(module: str, places: list[str]) -> AdapterMismatch:
    return AdapterMismatch(
        f"The adapter's module {module!r} can be {' or '.join(repr(place) for place in places)} of the base.",
        why="The adapter was trained on a part of the base, and its names fit more than one; each would be another "
        "model.",
        fix=f"Rename the adapter's tensors so that they say which one, for example {PREFIX + places[0]!r} in the place "
        f"of {PREFIX + module!r}.",
    )

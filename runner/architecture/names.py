"""Which stored tensor makes which parameter of a model class, by transformers' own conversion.

Covered: names that are kept or only renamed on loading (prefixes, old names), and which stored tensors transformers
computes a parameter from (fused experts, split or joined projections): `runner.architecture.conversion` does that.

Source: transformers `core_model_loading.convert_and_load_state_dict_in_model`, whose order of renaming this
follows; these functions are semi-private, hence the exact pin and a round-trip test.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNames:
    """Every stored tensor's place in the model.

    Attributes:
        renamed: state-dict key of the model → the one stored tensor that it is.
        converted: state-dict key of the model → the stored tensors that it is computed from, in transformers' order.
            Where one stored tensor makes several parameters, the key is the first of them.
        patterns: stored tensor in `converted` → the source pattern of transformers' converter that takes it.
        unknown: stored tensors that the model class does not know (multi-token-prediction heads and the like).
        transforms: the renamings and converters that matched a name, in order.
    """

    renamed: Mapping[str, str]
    converted: Mapping[str, tuple[str, ...]]
    patterns: Mapping[str, str]
    unknown: tuple[str, ...]
    transforms: tuple[WeightTransform, ...]


def map_names(model: PreTrainedModel, names: Iterable[str]) -> StoredNames:
    """Return where each of the stored `names` goes in `model` (its parameters may be on the meta device)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    keys = model.state_dict()
    prefix = model.base_model_prefix
    renamed: dict[str, str] = {}
    converted: dict[str, list[str]] = {}
    patterns: dict[str, str] = {}
    unknown: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, keys)
        if key not in keys and name in keys:
            key, pattern = rename_source_key(name, [], [], prefix, keys)
        if key not in keys:
            unknown.append(name)
        elif pattern is not None:
            converted.setdefault(key, []).append(name)
            patterns[name] = pattern
        else:
            renamed[key] = name
    return StoredNames(
        renamed=renamed,
        converted={key: tuple(sources) for key, sources in converted.items()},
        patterns=patterns,
        unknown=tuple(unknown),
        transforms=tuple(entry for entry in mapping if entry.was_used()),
    )

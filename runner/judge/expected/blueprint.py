"""The base's model class without weights: which keys it has, and which stored tensor each of them is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from runner.architecture.conversion import Conversion
from runner.architecture.names import map_names
from runner.files.layout import TensorInfo
from runner.judge.expected.classes import Task, build_empty
from runner.judge.expected.recipe import Recipe
from runner.judge.streaming.models import is_transposed
from runner.protocol.errors import AdapterMismatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model class without weights.

    Attributes:
        keys: shapes by key of its state dict.
        stored: key → the one stored tensor that it is; keys made from several stored tensors are left out.
        conversion: how the keys that are no stored tensor are computed from some.
        ties: key → key of the parameter that it shares, as the base's config has it; a stored one, where any is.
        transposed: modules whose weight is stored as (in, out).
        embeddings: modules that look rows up.
        heads: keys that no tensor of the base makes: only the adapter can have them.
        dropped: stored tensors of the base's own head, where a head of the adapter's takes its place.
        buffers: keys of what the model computes itself and no file needs to hold.
        empty: makes the model without weights.
    """

    keys: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    conversion: Conversion
    ties: Mapping[str, str]
    transposed: frozenset[str]
    embeddings: frozenset[str]
    heads: frozenset[str]
    dropped: frozenset[str]
    buffers: frozenset[str]
    empty: Callable[[], PreTrainedModel]


def read_blueprint(root: Path, tensors: Mapping[str, TensorInfo], task: Task) -> Blueprint:
    """Return the blueprint of the checkpoint in `root`, which stores `tensors`; reads config.json only.

    Args:
        root: the base's folder.
        tensors: its headers, by name.
        task: which class the merged model is of.

    Raises:
        BrokenCheckpoint: transformers cannot build the model class.
    """
    model = task.empty(root)
    found = map_names(model, tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    conversion = Conversion(found, shapes, lambda: task.empty(root))
    modules = dict(model.named_modules())
    keys = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    made = {*found.renamed, *conversion.groups}
    ties = _with_stored_origins(model.all_tied_weights_keys, made)
    made |= {key for pair in ties.items() if made & set(pair) for key in pair}
    return Blueprint(
        keys=keys,
        stored=dict(found.renamed),
        conversion=conversion,
        ties=ties,
        transposed=frozenset(path for path, module in modules.items() if is_transposed(module)),
        embeddings=frozenset(path for path, module in modules.items() if isinstance(module, nn.Embedding)),
        heads=frozenset(keys.keys() - made) if task.departs else frozenset(),
        dropped=_dropped(root, list(tensors), task, found.unknown),
        buffers=frozenset(key for key, _ in model.named_non_persistent_buffers()),
        empty=lambda: task.empty(root),
    )


def _with_stored_origins(ties: Mapping[str, str], made: Collection[str]) -> dict[str, str]:
    """Return the ties by an origin that the base stores.

    transformers declares each group of tied parameters by one of them; where that one is not stored, the first of the
    others that is takes its place.
    """
    origins = {
        origin: next((key for key in (origin, *(tied for tied in ties if ties[tied] == origin)) if key in made), origin)
        for origin in dict.fromkeys(ties.values())
    }
    groups = {key: origins[origin] for tied, origin in ties.items() for key in (origin, tied)}
    return {key: origin for key, origin in groups.items() if key != origin}


def _dropped(root: Path, names: Sequence[str], task: Task, unknown: Sequence[str]) -> frozenset[str]:
    """Return the base's tensors that a head of the adapter's replaces; all others must be in the merged folder."""
    if not task.has_new_head or not unknown:
        return frozenset()
    own = build_empty(root, task.own_class)
    mine = map_names(own, names)
    key_of = {name: key for key, name in mine.renamed.items()}
    key_of |= {name: key for key, made in mine.converted.items() for name in made}
    body = getattr(own, own.base_model_prefix, None)
    if body is None:
        heads = {f"{path}." for path, module in own.named_modules() if module is own.get_output_embeddings()}
        return frozenset(name for name in unknown if key_of.get(name, "").startswith(tuple(heads)))
    inside = f"{own.base_model_prefix}."
    return frozenset(name for name in unknown if name in key_of and not key_of[name].startswith(inside))


def check_heads(blueprint: Blueprint, recipe: Recipe) -> None:
    """Refuse an adapter that does not bring the whole of its own head.

    Raises:
        AdapterMismatch: a part of it is neither in the base nor in the adapter.
    """
    absent = sorted(blueprint.heads - recipe.rules.keys())
    if absent:
        raise AdapterMismatch(
            f"Neither the base nor the adapter has {absent[0]!r}.",
            why="The adapter's task needs it, and transformers would fill it with random numbers.",
            fix="Save the adapter with its head: name the head's modules in `modules_to_save`.",
        )

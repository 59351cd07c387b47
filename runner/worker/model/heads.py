"""Which class the merged model is of, and how many labels it has: the base's, or what the adapter's task needs.

A classification adapter is trained on another class than the base's: same body, another head, and the head's weights
are in the adapter alone. The merged model is then of the task's class, as transformers' auto classes name it for the
base's config; the base's own head is left out, and config.json says so. An adapter that was trained on a part of the
base (its text model, say) changes that part: the merged model is the base's class, with every tensor.
Not covered: classes that transformers does not have (refused).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from runner.architecture.adapter_names import WRAPPERS
from runner.files.adapter.folder import Adapter
from runner.files.sidecars.names import CONFIG
from runner.protocol.errors import UnsupportedAdapter
from runner.protocol.syntax import parse_json
from runner.worker.model.empty import empty_model

PREFIX = "base_model.model."
AUTO_CLASSES: Mapping[str, Any] = MappingProxyType(
    {
        "CAUSAL_LM": transformers.AutoModelForCausalLM,
        "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
        "FEATURE_EXTRACTION": transformers.AutoModel,
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
)
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks whose head is trained with the adapter
# What config.json may take from a config.json beside the adapter: how to read the labels, and how to pad.
CARRIED_FIELDS = ("problem_type", "pad_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """The labels of a trained head, and what config.json has to say about them."""

    count: int
    edits: Mapping[str, Any]


def adapter_keys(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Return the adapter's tensors as the base model would name them, with their shapes."""
    tensors = adapter.tensors.items()
    return {name[len(PREFIX) :]: tensor.shape for name, tensor in tensors if name.startswith(PREFIX)}


def choose_class(own: type[PreTrainedModel], config: PretrainedConfig, adapter: Adapter) -> type[PreTrainedModel]:
    """Return the class of the merged model: `own` unless the adapter's task or its tensor names say otherwise.

    Raises:
        UnsupportedAdapter: transformers has no class for the adapter's task on this architecture.
    """
    task = adapter.task_type
    candidates = [found for found in _candidates(config, adapter) if found is not own]
    if task in HEADED:
        if own in _task_classes(config, task):
            return own
        if not candidates:
            raise UnsupportedAdapter(
                f"The adapter's task type is {task!r}, for which transformers has no {config.model_type} class.",
                why="The adapter was trained on a class of the model that only the training's own code has.",
                fix="Release the adapter unmerged.",
            )
        return candidates[0]
    if not candidates or _fits(own, config, adapter):
        return own
    return next((found for found in candidates if _fits(found, config, adapter)), own)


def find_labels(model: PreTrainedModel, adapter: Adapter) -> Labels | None:
    """Return the number of labels where the adapter's head has another one than `model`, or names its labels itself.

    Args:
        model: of the task's class, on the meta device.
        adapter: with the trained head.
    """
    if adapter.task_type not in HEADED:
        return None
    current = int(model.config.num_labels)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    counts = {
        shape[0]
        for key, shape in adapter_keys(adapter).items()
        if key in shapes and shape != shapes[key] and shape[1:] == shapes[key][1:] and shapes[key][0] == current
    }
    count = counts.pop() if len(counts) == 1 else current
    own = _own_config(adapter)
    names = own.get("id2label")
    if not isinstance(names, dict) or len(names) != count:
        names = None
    edits: dict[str, Any] = {field: own[field] for field in CARRIED_FIELDS if own.get(field) is not None}
    if names is None and count == current:
        return Labels(count=count, edits=edits)
    labels = {str(key): str(name) for key, name in (names or {n: f"LABEL_{n}" for n in range(count)}).items()}
    edits |= {"id2label": labels, "label2id": {name: int(key) for key, name in labels.items()}}
    return Labels(count=count, edits=edits)


def _candidates(config: PretrainedConfig, adapter: Adapter) -> Iterator[type[PreTrainedModel]]:
    """Yield the classes that the adapter may have been trained on; one with another config is of a part of the base."""
    named = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    found = getattr(transformers, str(named), None) if named else None
    named_class = [found] if isinstance(found, type) and issubclass(found, PreTrainedModel) else []
    for model_class in (*named_class, *_task_classes(config, adapter.task_type)[:1]):
        if getattr(model_class, "config_class", None) is type(config):
            yield model_class


def _task_classes(config: PretrainedConfig, task: str | None) -> tuple[type[PreTrainedModel], ...]:
    auto = AUTO_CLASSES.get(str(task))
    found = auto._model_mapping.get(type(config), ()) if auto is not None else ()
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def _fits(model_class: type[PreTrainedModel], config: PretrainedConfig, adapter: Adapter) -> bool:
    """Return whether every tensor of the adapter leads to a module of the class that holds no other modules."""
    modules = dict(empty_model(model_class, config).named_modules())
    for key in adapter_keys(adapter):
        parts = [part for part in key.split(".") if part not in WRAPPERS]
        while parts and ".".join(parts) not in modules:
            parts.pop()
        if not parts or any(True for _ in modules[".".join(parts)].children()):
            return False
    return True


def _own_config(adapter: Adapter) -> dict[str, Any]:
    try:
        config = parse_json((adapter.root / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}

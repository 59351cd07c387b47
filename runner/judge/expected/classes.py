"""Which class the merged model must be of, and with how many labels: the judge's own reading of base and adapter.

An adapter for classification was trained on another class than the base's, with a head that only the adapter has. A
right merge is of that class, says so in config.json, holds the head, and leaves the base's own head out, and nothing
else of the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from runner.architecture.adapter_names import WRAPPERS
from runner.architecture.building import bounded_build
from runner.judge.expected.recipe import PREFIX, read_adapter_config, read_adapter_header
from runner.judge.streaming.models import LOAD_ERRORS, model_class, quiet, unbuildable
from runner.judge.structure import read_json
from runner.protocol.errors import BrokenCheckpoint, UnsupportedAdapter

# The auto class that a user trains each task with, and how transformers names its models.
_TASKS: Mapping[str, tuple[str, str]] = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "ForSequenceClassification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "ForTokenClassification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "ForQuestionAnswering"),
}
_BODIES: Mapping[str, str] = {
    "FEATURE_EXTRACTION": "AutoModel",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
_FROM_ADAPTER = ("problem_type", "pad_token_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What the merged model is.

    Attributes:
        model_class: the class that it must load as.
        own_class: the class of the base.
        labels: how many the head has; None where the base's number holds.
        config: keys of config.json that must have these values instead of the base's.
        is_headed: whether the adapter's task is one with a head that is trained with it.
    """

    model_class: Any
    own_class: Any
    is_headed: bool
    labels: int | None
    config: Mapping[str, Any]

    @property
    def has_new_head(self) -> bool:
        """Whether a head of the adapter's takes the place of the base's own."""
        return self.model_class is not self.own_class and self.is_headed

    @property
    def departs(self) -> bool:
        """Whether the merged model is of another class than the base, or has other labels."""
        return self.model_class is not self.own_class or self.labels is not None

    def empty(self, root: Path) -> PreTrainedModel:
        """Return the model of the checkpoint in `root` on the meta device, in the task's class.

        Raises:
            BrokenCheckpoint: transformers cannot build it.
        """
        return build_empty(root, self.model_class, self.labels)


def build_empty(root: Path, wanted: Any, labels: int | None = None) -> PreTrainedModel:
    """Return a model of the class `wanted`, without weights, from the config in `root`.

    Raises:
        BrokenCheckpoint: transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        if labels is not None:
            config.num_labels = labels
        with bounded_build(root), torch.device("meta"), quiet():
            # An auto class finds the class by the config; `_from_config` is what every class has.
            make = wanted._from_config if hasattr(wanted, "_from_config") else wanted.from_config
            model: PreTrainedModel = make(config)
    except LOAD_ERRORS as error:
        raise unbuildable(error) from error
    return model


def empty_model(root: Path) -> PreTrainedModel:
    """Return the model of the checkpoint in `root` on the meta device, in its own class; reads config.json only.

    Raises:
        BrokenCheckpoint: transformers cannot build the model class.
    """
    return build_empty(root, model_class(root))


def read_task(base: Path, adapter: Path) -> Task:
    """Return what a right merge of `adapter` into `base` is.

    Raises:
        BrokenAdapter: the adapter cannot be read.
        BrokenCheckpoint: the base's model class cannot be built.
        UnsupportedAdapter: transformers has no class for the adapter's task.
    """
    own = model_class(base)
    config = read_adapter_config(adapter)
    tensors = read_adapter_header(adapter)
    shapes = {name[len(PREFIX) :]: info.shape for name, info in tensors.items() if name.startswith(PREFIX)}
    if config.get("task_type") not in _TASKS:
        chosen = _body(base, own, config, shapes)
        edits = {} if chosen is own else {"architectures": [chosen.__name__]}
        return Task(model_class=chosen, own_class=own, is_headed=False, labels=None, config=edits)
    auto, suffix = _TASKS[str(config["task_type"])]
    chosen = own if own.__name__.endswith(suffix) else type(_of_task(base, auto))
    model = build_empty(base, chosen)
    labels = _count_labels(model, shapes)
    edits = {} if chosen is own else {"architectures": [chosen.__name__]}
    edits |= _label_edits(adapter, labels, int(model.config.num_labels))
    is_other = labels != model.config.num_labels
    labels_or_none = labels if is_other else None
    return Task(model_class=chosen, own_class=own, is_headed=True, labels=labels_or_none, config=edits)


def _of_task(base: Path, auto: str) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
        with bounded_build(base), torch.device("meta"), quiet():
            model: PreTrainedModel = getattr(transformers, auto).from_config(config)
    except LOAD_ERRORS as error:
        raise UnsupportedAdapter(
            f"transformers has no model for the adapter's task: {auto} does not know {base.name!r}'s architecture.",
            why="The adapter was trained on a class of the model that only the training's own code has.",
            fix="Release the adapter unmerged.",
        ) from error
    return model


def _body(base: Path, own: Any, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Return the base's own class, or, where the adapter's names do not fit that, the one that they do fit.

    A class that has another config than the base is of a part of it. A release is never a part.
    """
    auto = _BODIES.get(str(config.get("task_type")))
    named = str((config.get("auto_mapping") or {}).get("base_model_class") or auto or "")
    wanted = getattr(transformers, named, None)
    mine = build_empty(base, own) if wanted is not None else None
    if mine is None or _fits(mine, shapes):
        return own
    try:
        model = build_empty(base, wanted)
    except BrokenCheckpoint:  # that class is not for this base
        return own
    is_whole = type(model).config_class is type(mine.config)
    return type(model) if is_whole and _fits(model, shapes) else own


def _fits(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether every tensor of the adapter sits in, or on, a module that has no modules inside."""
    leaves = {path for path, module in model.named_modules() if not any(True for _ in module.children())}
    return all(any(prefix in leaves for prefix in _prefixes(key)) for key in shapes)


def _prefixes(key: str) -> list[str]:
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _count_labels(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the rows of the trained head: of the adapter's only whole tensor that differs from the model's there."""
    current = int(model.config.num_labels)
    for key, tensor in model.state_dict().items():
        found = shapes.get(key)
        if found is not None and found != tuple(tensor.shape) and tensor.shape[0] == current:
            return found[0]
    return current


def _label_edits(adapter: Path, labels: int, current: int) -> dict[str, Any]:
    own = read_json(adapter / "config.json") or {}
    edits = {key: own[key] for key in _FROM_ADAPTER if own.get(key) is not None}
    names = own.get("id2label")
    if isinstance(names, dict) and len(names) == labels:
        return edits | {"id2label": names, "label2id": {str(name): int(key) for key, name in names.items()}}
    if labels == current:
        return edits
    names = {str(number): f"LABEL_{number}" for number in range(labels)}
    return edits | {"id2label": names, "label2id": {name: int(key) for key, name in names.items()}}

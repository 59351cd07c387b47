"""The base's model class without weights: which keys it has, and which stored tensor each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from runner.checkpoint.names import map_names
from runner.verify.models import LOAD_ERRORS, is_transposed, model_class, quiet, unbuildable


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model class without weights.

    Attributes:
        keys: shapes by key of its state dict.
        stored: key → the one stored tensor that it is; keys made from several stored tensors are left out.
        converted: keys that transformers computes from several stored tensors.
        ties: key → key of the parameter that it shares, as the base's config has it.
        transposed: modules whose weight is stored as (in, out).
        embeddings: modules that look rows up.
    """

    keys: Mapping[str, tuple[int, ...]]
    stored: Mapping[str, str]
    converted: frozenset[str]
    ties: Mapping[str, str]
    transposed: frozenset[str]
    embeddings: frozenset[str]


def read_blueprint(root: Path, names: Sequence[str]) -> Blueprint:
    """Return the blueprint of the checkpoint in `root`, whose stored tensors are `names`; reads config.json only.

    Raises:
        BrokenCheckpoint: transformers cannot build the model class.
    """
    model = empty_model(root)
    found = map_names(model, names)
    modules = dict(model.named_modules())
    return Blueprint(
        keys={key: tuple(tensor.shape) for key, tensor in model.state_dict().items()},
        stored=dict(found.renamed),
        converted=frozenset(found.converted),
        ties=dict(model.all_tied_weights_keys),
        transposed=frozenset(path for path, module in modules.items() if is_transposed(module)),
        embeddings=frozenset(path for path, module in modules.items() if isinstance(module, nn.Embedding)),
    )


def empty_model(root: Path) -> PreTrainedModel:
    """Return the model of the checkpoint in `root` on the meta device; reads config.json only.

    Raises:
        BrokenCheckpoint: transformers cannot build the model class.
    """
    try:
        config = AutoConfig.from_pretrained(str(root), trust_remote_code=False)
        with torch.device("meta"), quiet():
            model: PreTrainedModel = model_class(root)._from_config(config)
    except LOAD_ERRORS as error:
        raise unbuildable(error) from error
    return model

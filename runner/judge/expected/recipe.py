"""What an adapter folder says should happen to which parameter, read from its config and tensor names alone.

Covered in closed form: LoRA and rsLoRA on linear layers, Conv1D and embeddings, with rank and alpha patterns, their
trained biases (`lora_bias`, `bias`), and whole tensors (`modules_to_save`). Every other method, and every LoRA variant,
goes to `Recipe.others`: its exact weight comes from PEFT's own layer, computed in float64.

This is the judge's own reading of PEFT's file format; it uses nothing of the merge. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.layout import TensorInfo, read_tensor_file
from runner.protocol.errors import BrokenAdapter, CheckpointError
from runner.protocol.syntax import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

# A truthy one of these makes LoRA something else than W + s·B·A, or changes the base when it is attached.
_VARIANTS = (
    "use_dora", "use_qalora", "velora_config", "alora_invocation_tokens", "monteclora_config", "use_bdlora",
    "arrow_config", "kasa_config", "layer_replication", "megatron_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|base_layer\.(?:weight|bias))"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
_REDUNDANT = re.compile(r"(?P<module>.+)\.(?:modules_to_save|original_module)\.(?P<name>[^.]+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """E = W + scaling · B·A.

    Attributes:
        a: adapter tensor of shape (rank, in); (rank, rows) for an embedding.
        b: adapter tensor of shape (out, rank); (width, rank) for an embedding.
        scaling: alpha/rank, or alpha/sqrt(rank) for rsLoRA.
        rank: from the shape of `a`.
        is_embedding: whether the product is transposed, (B·A)ᵀ.
        replaced_base: an adapter tensor that takes W's place, or None.
    """

    a: str
    b: str
    scaling: float
    rank: int
    is_embedding: bool
    replaced_base: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """E = W + scaling · tensor: a LoRA bias."""

    tensor: str
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """E = the adapter's tensor."""

    tensor: str


Rule = LowRank | Shift | Copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An adapter, read.

    Attributes:
        root: the adapter's folder.
        peft_type: for example "LORA".
        config: adapter_config.json.
        tensors: every tensor of the adapter by its name in the file.
        rules: key of the base model's state dict → what becomes of it, where there is a closed form.
        stored: the same for stored tensors that are no parameter of the model's class: experts that it fuses.
        others: adapter tensors that no rule uses.
        redundant: adapter tensors that only repeat others; PEFT writes them beside a resized vocabulary.
    """

    root: Path
    peft_type: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    rules: Mapping[str, Rule]
    stored: Mapping[str, Rule]
    others: tuple[str, ...]
    redundant: tuple[str, ...]


def read_recipe(root: Path, parameters: Sequence[str], fused: Sequence[str] = ()) -> Recipe:
    """Return what the adapter in `root` does to a model whose state dict has the keys `parameters`.

    Args:
        root: the adapter's folder.
        parameters: keys of the model's state dict.
        fused: stored tensors that the model's class fuses; an older class had a parameter for each.

    Raises:
        BrokenAdapter: config or weights are missing or unreadable, or half of a pair is missing.
    """
    config = read_adapter_config(root)
    tensors = read_adapter_header(root)
    keys = {name.removeprefix(PREFIX): name for name in tensors}
    known = frozenset(parameters)
    parts: dict[str, dict[str, str]] = {}
    copies: dict[str, str] = {}
    others: list[str] = []
    redundant: list[str] = []
    for key, name in sorted(keys.items()):
        if match := _PART.fullmatch(key):
            parts.setdefault(match["module"], {})[match["part"]] = name
        elif key in known:
            copies[key] = name
        elif (match := _REDUNDANT.fullmatch(key)) and f"{match['module']}.{match['name']}" in keys:
            redundant.append(name)
        elif key.endswith(_TOKENS) and _has_twin(root, tensors, name):
            redundant.append(name)
            others.append(name)
        else:
            others.append(name)
    rules: dict[str, Rule] = {key: Copy(tensor=name) for key, name in copies.items()}
    separate = frozenset(fused)
    stored: dict[str, Rule] = {}
    for module, found in parts.items():
        weight = f"{module}.weight"
        is_mine = (weight in known or weight in separate) and _is_plain(config, others, module)
        made = _module_rules(module, found, config, tensors) if is_mine else None
        if made is not None and made.keys() <= known:
            rules |= made
        elif made is not None and made.keys() <= separate:
            stored |= made
        else:
            others.extend(found.values())
    return Recipe(
        root=root,
        peft_type=str(config.get("peft_type")),
        config=config,
        tensors=tensors,
        rules=rules,
        stored=stored,
        others=tuple(sorted(others)),
        redundant=tuple(redundant),
    )


def _has_twin(root: Path, tensors: Mapping[str, TensorInfo], name: str) -> bool:
    """Return whether another embedding trains the same tokens to the same values, as the two sides of a tie do."""
    twins = [other for other in tensors if other.endswith(_TOKENS) and other != name]
    data = (root / WEIGHTS_FILE).read_bytes() if twins else b""
    mine = data[tensors[name].start : tensors[name].end]
    return any(data[tensors[twin].start : tensors[twin].end] == mine for twin in twins)


def _is_plain(config: Mapping[str, Any], others: Sequence[str], module: str) -> bool:
    extra = any(name.removeprefix(PREFIX).startswith(f"{module}.") for name in others)
    return (
        config.get("peft_type") == "LORA"
        and not any(config.get(field) for field in _VARIANTS)
        and config.get("init_lora_weights") in _PLAIN_INITS
        and not extra
    )


def _module_rules(
    module: str, parts: Mapping[str, str], config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, Rule] | None:
    """Return the rules of one module, or None where the parts have no closed form here."""
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    rules: dict[str, Rule] = {}
    if "base_layer.bias" in parts:
        rules[f"{module}.bias"] = Copy(tensor=parts["base_layer.bias"])
    if a not in parts and b not in parts:
        if "base_layer.weight" in parts:
            rules[f"{module}.weight"] = Copy(tensor=parts["base_layer.weight"])
        return rules
    if a not in parts or b not in parts:
        raise _broken(f"The adapter has {next(iter(parts.values()))!r}, but not both halves of that pair.")
    shape_a, shape_b = tensors[parts[a]].shape, tensors[parts[b]].shape
    if len(shape_a) != 2 or len(shape_b) != 2 or "lora_A.bias" in parts:
        return None
    if shape_a[0] != shape_b[1]:
        raise _broken(f"{parts[a]!r} is {list(shape_a)} and {parts[b]!r} is {list(shape_b)}: their ranks differ.")
    scaling = scaling_of(module, config)
    rules[f"{module}.weight"] = LowRank(
        a=parts[a],
        b=parts[b],
        scaling=scaling,
        rank=shape_a[0],
        is_embedding=is_embedding,
        replaced_base=parts.get("base_layer.weight"),
    )
    if "lora_B.bias" in parts:
        if "base_layer.bias" in parts:
            return None
        rules[f"{module}.bias"] = Shift(tensor=parts["lora_B.bias"], scaling=scaling)
    return rules


def scaling_of(module: str, config: Mapping[str, Any]) -> float:
    """Return the factor of B·A for one module.

    Source: PEFT's documentation of `rank_pattern` and `alpha_pattern` (the first key that matches the end of the
    module's path as a regular expression wins) and of `use_rslora` (alpha/sqrt(r) instead of alpha/r).
    """
    rank = value_of(config.get("rank_pattern"), module, config.get("r", 8))
    alpha = value_of(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def value_of(patterns: Any, module: str, default: Any) -> Any:
    """Return what `rank_pattern` or `alpha_pattern` says of a module, or the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_adapter_config(root: Path) -> dict[str, Any]:
    """Return the adapter's configuration.

    Raises:
        BrokenAdapter: missing, or not a JSON object.
    """
    try:
        config = parse_json((root / CONFIG_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise _broken(f"{CONFIG_FILE} cannot be read: {error.__class__.__name__}.") from error
    if not isinstance(config, dict):
        raise _broken(f"{CONFIG_FILE} is not a JSON object.")
    return config


def read_adapter_header(root: Path) -> dict[str, TensorInfo]:
    """Return the adapter's tensors by their names in the file.

    Raises:
        BrokenAdapter: the file is missing or damaged.
    """
    try:
        file = read_tensor_file(root, WEIGHTS_FILE)
    except CheckpointError as error:
        raise BrokenAdapter(error.problem.what, why=error.problem.why, fix=error.problem.fix) from error
    return {tensor.name: tensor for tensor in file.tensors}


def _broken(what: str) -> BrokenAdapter:
    return BrokenAdapter(
        what,
        why="The adapter folder was not written, or not copied, as a whole.",
        fix="Save or download the adapter again.",
    )

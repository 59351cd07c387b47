"""A base and an adapter, put together by PEFT without reading the base.

The model class is built on the meta device, then every parameter becomes a zero-copy view of the memory-mapped
checkpoint *before* PEFT attaches the adapter: on a meta base PEFT loses every adapter weight, silently, and with
`low_cpu_mem_usage=True` it rounds the adapter to the base's dtype (design decision 1).

Promised: every adapter tensor is placed, exactly as stored, or the run fails and names it.
Not covered: parameters that transformers computes from several stored tensors (fused experts); touching one is
refused. Heads that only the adapter has are refused, too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.peft_model import PeftModelForCausalLM, PeftModelForSeq2SeqLM
from peft.utils.save_and_load import set_peft_model_state_dict
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from runner.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from runner.checkpoint.layout import Checkpoint
from runner.checkpoint.names import StoredNames, map_names
from runner.companions import read_config
from runner.errors import AdapterMismatch, BrokenCheckpoint, UnsupportedAdapter, UnsupportedCheckpoint

ADAPTER_NAME = "default"
# Methods that do not look at the base's values when they are attached. All others get the base in float32 in
# memory, because what they derive from it (norms, principal directions) must not be derived from rounded values.
LAZY_METHODS = frozenset(
    """LORA ADALORA LOHA LOKR IA3 OFT BOFT VERA PVERA FOURIERFT WAVEFT HRA VBLORA MISS RANDLORA ROAD SHIRA C3A GRALORA
    LN_TUNING TRAINABLE_TOKENS""".split()
)
LAZY_LORA_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
TASK_CLASSES: Mapping[str | None, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModel,
    None: PeftModel,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A base model with an adapter on it.

    Attributes:
        checkpoint: the base on disk.
        adapter: the adapter on disk.
        model: the base's class, its modules wrapped by PEFT where the adapter acts.
        peft_model: PEFT's wrapper around `model`.
        names: stored names of the model's parameters.
        parameters: the base's own parameters and buffers by state-dict key, as they were before PEFT came.
        ties: state-dict key → key of the parameter that it shares.
        replaced: parameters of the base that the adapter (or PEFT, when attaching) gave new values, by key.
        is_lazy: whether the parameters are views of files; else they are float32 in memory.
    """

    checkpoint: Checkpoint
    adapter: Adapter
    model: PreTrainedModel
    peft_model: PeftModel
    names: StoredNames
    parameters: Mapping[str, torch.Tensor]
    ties: Mapping[str, str]
    replaced: Mapping[str, torch.Tensor]
    is_lazy: bool


def attach(checkpoint: Checkpoint, adapter: Adapter) -> Attached:
    """Return base and adapter, attached; reads headers, configs and the adapter, no weight of a lazy method's base.

    Raises:
        AdapterMismatch: a tensor of the adapter fits nothing in the base, or one that must be there is missing.
        UnsupportedAdapter: a field of its config is unknown here.
        UnsupportedCheckpoint: a base that this version cannot merge exactly.
    """
    config = _peft_config(adapter)
    is_lazy = adapter.peft_type in LAZY_METHODS and _init(adapter) in LAZY_LORA_INITS
    model = _empty_model(checkpoint)
    names = map_names(model, checkpoint.tensors)
    _fill(model, checkpoint, names, in_memory=not is_lazy)
    ties = _tie(model, names)
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    before = {key: (tensor.data_ptr(), tensor._version) for key, tensor in parameters.items()}
    peft_model = _wrap(model, config, adapter)
    placed = _load(peft_model, adapter)
    replaced = _replaced(parameters, before, peft_model, placed)
    return Attached(
        checkpoint=checkpoint,
        adapter=adapter,
        model=model,
        peft_model=peft_model,
        names=names,
        parameters=parameters,
        ties=ties,
        replaced=replaced,
        is_lazy=is_lazy,
    )


def _peft_config(adapter: Adapter) -> PeftConfig:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.peft_type]
    known = {field.name for field in dataclasses.fields(config_class)} | {"task_type", "peft_version"}
    unknown = sorted(key for key, value in adapter.config.items() if key not in known and value)
    if unknown:
        raise UnsupportedAdapter(
            f"{CONFIG_FILE} sets {', '.join(f'`{key}`' for key in unknown)}, which this PEFT does not know.",
            why="A field that is ignored can change what the adapter means.",
            fix="Use a newer release of this action, or remove the field if you know that it has no effect.",
        )
    if adapter.task_type not in TASK_CLASSES:
        raise UnsupportedAdapter(
            f"The adapter's task type is {adapter.task_type!r}.",
            why="Its head lives only in the adapter; this version merges text models with the base's own head.",
            fix="Release the adapter unmerged for now.",
        )
    try:
        config: PeftConfig = config_class.from_pretrained(str(adapter.root))
    except (TypeError, ValueError) as error:
        raise UnsupportedAdapter(
            f"PEFT refuses {CONFIG_FILE}: {_first_line(error)}",
            why="Its fields contradict each other, or were written by another version.",
            fix="Save the adapter again with the PEFT version that trained it.",
        ) from error
    config.inference_mode = True
    return config


def _init(adapter: Adapter) -> Any:
    init = adapter.config.get("init_lora_weights", True)
    return init if isinstance(init, bool) or init is None else str(init)


def _empty_model(checkpoint: Checkpoint) -> PreTrainedModel:
    raw = read_config(checkpoint.root)
    architecture = next(iter(raw.get("architectures") or ()), None)
    model_class = getattr(transformers, str(architecture), None)
    if raw.get("quantization_config"):
        raise UnsupportedCheckpoint(
            "The base is quantised (its config.json has `quantization_config`).",
            why="A delta added to quantised weights does not survive quantising them again.",
            fix="Set `base-model` to the 16-bit model that it was made from.",
        )
    if model_class is None or not issubclass(model_class, PreTrainedModel):
        raise UnsupportedCheckpoint(
            f"The base's architecture is {architecture!r}, which this transformers has no class for.",
            why="Code that comes with a model is never run.",
            fix="Use a base whose architecture is part of transformers, or a newer release of this action.",
        )
    try:
        config = AutoConfig.from_pretrained(str(checkpoint.root), trust_remote_code=False)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = model_class._from_config(config)
    except (ValueError, OSError, TypeError, AttributeError) as error:
        raise BrokenCheckpoint(
            f"The model class {architecture} cannot be built from config.json: {_first_line(error)}",
            why="config.json is incomplete, or was written for other code.",
            fix="Download the base again, or use the revision that its authors name.",
        ) from error
    return model.eval()


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, names: StoredNames, *, in_memory: bool) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    by_file: dict[str, list[tuple[str, str]]] = {}
    for key, stored in names.renamed.items():
        info = checkpoint.tensors[stored]
        if info.shape != shapes[key]:
            raise BrokenCheckpoint(
                f"{stored!r} is stored as {list(info.shape)}, but config.json asks for {list(shapes[key])}.",
                why="config.json and weights are of different models.",
                fix="Download the base again, all files at one revision.",
            )
        by_file.setdefault(info.file, []).append((key, stored))
    for file, entries in by_file.items():
        with safe_open(str(checkpoint.root / file), framework="pt", device="cpu") as handle:
            for key, stored in entries:
                view = handle.get_tensor(stored)  # a view of the mapping, which lives as long as the tensor
                _assign(model, key, view.float() if in_memory and view.is_floating_point() else view)
    for key in names.converted:
        _assign(model, key, torch.zeros((), dtype=torch.bfloat16).expand(shapes[key]))


def _assign(model: nn.Module, key: str, tensor: torch.Tensor) -> None:
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def _tie(model: PreTrainedModel, names: StoredNames) -> dict[str, str]:
    # As transformers v5 does on loading: a target that is stored, too, and differs from its source is not tied.
    ties: dict[str, str] = {}
    stored = names.renamed
    for target, source in model.all_tied_weights_keys.items():
        if target in stored and source in stored:
            if not torch.equal(model.get_parameter(target), model.get_parameter(source)):
                continue
            first, second = target, source
        elif source in stored:
            first, second = target, source
        else:
            first, second = source, target
        if second in stored:
            path, _, name = first.rpartition(".")
            model.get_submodule(path)._parameters[name] = model.get_parameter(second)
            ties[first] = second
    missing = sorted(key for key, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise BrokenCheckpoint(
            f"The base lacks {missing[0]!r}" + (f" and {len(missing) - 1} more tensors." if len(missing) > 1 else "."),
            why=f"{type(model).__name__} needs it, and transformers would fill it with random numbers.",
            fix="Use a complete checkpoint of this architecture as `base-model`.",
        )
    return ties


def _wrap(model: PreTrainedModel, config: PeftConfig, adapter: Adapter) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = TASK_CLASSES[adapter.task_type](
                model, config, ADAPTER_NAME, autocast_adapter_dtype=True, low_cpu_mem_usage=False
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError) as error:
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on {type(model).__name__}: {_first_line(error)}",
            why=f"The adapter says that it was trained on {adapter.base_model!r}.",
            fix="Set `base-model` to the model that the adapter was trained on.",
        ) from error
    return wrapped.eval()


def _load(peft_model: PeftModel, adapter: Adapter) -> dict[str, torch.Tensor]:
    """Load the adapter and return what it changed: state-dict key of the PEFT model → tensor as stored.

    A copy of a base tensor that only repeats the base (PEFT saves one beside an embedding's LoRA) is left out.
    """
    with safe_open(str(adapter.root / WEIGHTS_FILE), framework="pt", device="cpu") as handle:
        weights = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  (not a dict)
    placed: dict[str, torch.Tensor] = {}
    load_state_dict = peft_model.load_state_dict

    def recording(state_dict: Mapping[str, torch.Tensor], strict: bool = True) -> Any:
        placed.update((key, tensor) for key, tensor in state_dict.items() if not _repeats(peft_model, key, tensor))
        return load_state_dict(state_dict, strict=strict)

    # PEFT maps file names to parameters inside this call; listening in on its last step is the only way to learn
    # the mapping without repeating it.
    peft_model.load_state_dict = recording
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(peft_model, weights, ADAPTER_NAME)
    except KeyError as error:
        raise _missing(str(error.args[0]), adapter) from error
    except (RuntimeError, ValueError) as error:
        raise _wrong_shape(error, adapter) from error
    finally:
        del peft_model.load_state_dict
    if result.unexpected_keys:
        raise _unplaced(sorted(result.unexpected_keys), adapter)
    missing = [key for key in result.missing_keys if _must_be_in_file(key, adapter)]
    if missing:
        raise _missing(missing[0], adapter)
    _widen(peft_model, placed)
    return placed


def _repeats(peft_model: PeftModel, key: str, tensor: torch.Tensor) -> bool:
    target = _lookup(peft_model, key)
    return (
        target is not None
        and ADAPTER_NAME not in key.split(".")
        and target.shape == tensor.shape
        and torch.equal(target.to(torch.float32), tensor.to(torch.float32))
    )


def _must_be_in_file(key: str, adapter: Adapter) -> bool:
    # As PEFT's load_adapter; vector banks and the like are shared, and stored once under another key.
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(adapter.peft_type, "")
    is_shared = "vblora_vector_bank" in key or ".tinylora_v." in key or ".unilora_theta_d." in key
    return bool(prefix) and prefix in key and ADAPTER_NAME in key and not is_shared


def _widen(peft_model: PeftModel, placed: Mapping[str, torch.Tensor]) -> None:
    # PEFT copies modules_to_save in the base's dtype, which would round a float32 adapter before the merge does.
    for key, tensor in placed.items():
        target = _lookup(peft_model, key)
        if target is not None and target.is_floating_point() and target.dtype.itemsize < tensor.dtype.itemsize:
            target.data = tensor.clone()


def _replaced(
    parameters: Mapping[str, torch.Tensor],
    before: Mapping[str, tuple[int, int]],
    peft_model: PeftModel,
    placed: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    by_id = {id(_lookup(peft_model, key)): tensor for key, tensor in placed.items()}
    replaced: dict[str, torch.Tensor] = {}
    for key, parameter in parameters.items():
        if id(parameter) in by_id:
            replaced[key] = by_id[id(parameter)]
        elif (parameter.data_ptr(), parameter._version) != before[key]:
            replaced[key] = parameter.data
    return replaced


def _lookup(module: nn.Module, key: str) -> torch.Tensor | None:
    path, _, name = key.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    found = owner._parameters.get(name)
    return found if found is not None else owner._buffers.get(name)


def _unplaced(keys: list[str], adapter: Adapter) -> AdapterMismatch:
    return AdapterMismatch(
        f"Nothing in the base takes the adapter tensor {keys[0]!r}"
        + (f" (nor {len(keys) - 1} more)." if keys[1:] else "."),
        why=f"The adapter says that it was trained on {adapter.base_model!r}; PEFT would drop the tensor silently.",
        fix="Set `base-model` to the model that the adapter was trained on.",
    )


def _missing(key: str, adapter: Adapter) -> AdapterMismatch:
    return AdapterMismatch(
        f"The adapter has no tensor for {key!r}.",
        why=f"{CONFIG_FILE} asks for it in this base; PEFT would leave it random or zero. "
        f"The adapter says that it was trained on {adapter.base_model!r}.",
        fix="Set `base-model` to the model that the adapter was trained on, or save the adapter again as a whole.",
    )


def _wrong_shape(error: Exception, adapter: Adapter) -> AdapterMismatch:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return AdapterMismatch(
        f"The adapter does not fit the base: {lines[0] if lines else _first_line(error)}",
        why=f"The adapter says that it was trained on {adapter.base_model!r}; shapes differ from this base's.",
        fix="Set `base-model` (and `base-revision`) to the model that the adapter was trained on.",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

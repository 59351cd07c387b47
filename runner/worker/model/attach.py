"""A base and its adapters, put together by PEFT without reading the base; several adapters are combined first.

The base's parameters are views of the mapped checkpoint (see `base_model`) *before* PEFT attaches the adapter: on
a meta base PEFT loses every adapter weight, silently, and with `low_cpu_mem_usage=True` it rounds the adapter to the
base's dtype (design decision 1).

Promised: every adapter tensor is placed, exactly as stored, or the run fails and names it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from runner.architecture.adapter_names import Naming, name_adapter
from runner.architecture.conversion import Conversion
from runner.architecture.names import StoredNames
from runner.files.adapter.folder import CONFIG_FILE, WEIGHTS_FILE, Adapter
from runner.files.adapter.methods import HARMLESS_FIELDS, TASK_CLASSES, reads_base
from runner.files.layout import Checkpoint
from runner.protocol.combination import Combination
from runner.protocol.errors import AdapterMismatch, UnsupportedAdapter
from runner.worker.model.base_model import Base, open_base
from runner.worker.model.combined import combine
from runner.worker.model.empty import first_line
from runner.worker.model.expert_packing import as_peft_packs
from runner.worker.model.heads import PREFIX
from runner.worker.model.placed import check_copies, is_repeated, is_wrapper, mark, repeats, replaced, untrained, widen
from runner.worker.model.single_experts import Single, describe, find_single_experts, pack_single_experts, target_stacks
from runner.worker.tensors.mapped import LoadResult, MappedFile

ADAPTER_NAME = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """A base model with an adapter on it.

    Attributes:
        checkpoint: the base on disk, as the model's class sees it.
        adapters: the adapters on disk; the model holds the one, or what the several were combined to.
        model: the base's class or that of the adapter's task, its modules wrapped by PEFT where the adapter acts.
        peft_model: PEFT's wrapper around `model`.
        names: stored names of the model's parameters.
        conversion: how the parameters that are no stored tensor are computed from some.
        parameters: the base's own parameters and buffers by state-dict key, as they were before PEFT came.
        ties: state-dict key → key of the parameter that it shares.
        own: keys whose values only the adapter has, such as those of a head of its own.
        replaced: parameters of the base that the adapter (or PEFT, when attaching) gave new values, by key.
        config_edits: keys of config.json that the adapter's task changes, with their new values.
        notes: what the user should know, one sentence each.
        is_lazy: whether the parameters are views of files; else they are float32 in memory.
    """

    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    model: PreTrainedModel
    peft_model: PeftModel
    names: StoredNames
    conversion: Conversion
    parameters: Mapping[str, torch.Tensor]
    ties: Mapping[str, str]
    own: frozenset[str]
    replaced: Mapping[str, torch.Tensor]
    config_edits: Mapping[str, Any]
    notes: tuple[str, ...]
    is_lazy: bool

    @property
    def adapter(self) -> Adapter:
        """The first adapter, which decides what is not in the weights."""
        return self.adapters[0]

    @property
    def twins(self) -> Mapping[str, str]:
        """Stored name → stored name of the tensor that it is tied to, where the base stores both."""
        stored = self.names.renamed
        return {stored[target]: stored[source] for target, source in self.ties.items() if target in stored}


def attach(
    checkpoint: Checkpoint, *adapters: Adapter, combination: Combination | None = None, only_plans: bool = False
) -> Attached:
    """Return base and adapter, attached; reads headers, configs and the adapter, no weight of a lazy method's base.

    Args:
        checkpoint: the base.
        adapters: one, or several that `check_combinable` found good.
        combination: how several become one; None for one.
        only_plans: several become one of the right modules and shapes, with whatever values are quickest; the base
            may be headers without weights.

    Raises:
        AdapterMismatch: a tensor of the adapter fits nothing in the base, or one that must be there is missing.
        UnsupportedAdapter: a field of its config is unknown here, or several cannot be combined exactly.
        UnsupportedCheckpoint: a base that this version cannot merge exactly.
    """
    adapter = adapters[0]
    is_lazy = not any(reads_base(part.config) for part in adapters)
    base = open_base(checkpoint, adapter, in_memory=not is_lazy)
    model = base.model
    stored = model.state_dict()  # not the buffers that no checkpoint holds, such as Gemma's scale of its embeddings
    buffers = {key: tensor for key, tensor in model.named_buffers() if key in stored}
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **buffers}
    before = {key: mark(tensor) for key, tensor in parameters.items()}
    namings = [name_adapter(model, one.config, one.tensors) for one in adapters]
    if combination is None:
        config, names = _peft_config(adapter, namings[0]), namings[0].names
        shapes = {key: tuple(tensor.shape) for key, tensor in stored.items()}
        stacks = find_single_experts(shapes, names.values()) if isinstance(config, LoraConfig) else ()
        if stacks:
            target_stacks(config, stacks, shapes)
        peft_model = _wrap(model, config, adapter, ADAPTER_NAME, names.values())
        placed, packing = _load(peft_model, adapter, ADAPTER_NAME, names, _unknown(base), stacks)
        _check_biases(peft_model, adapter)
    else:
        peft_model = _wrap_several(model, adapters, namings, only_plans=only_plans)
        quickest = Combination(kind="cat", weights=combination.weights)
        combine(peft_model, quickest if only_plans else combination, into=ADAPTER_NAME)
        placed, packing = {}, ()
    assert not untrained(base.own, placed, ADAPTER_NAME)  # noqa: S101  (open_base refuses a head that nobody has)
    return Attached(
        checkpoint=base.checkpoint,
        adapters=adapters,
        model=model,
        peft_model=peft_model,
        names=base.names,
        conversion=base.conversion,
        parameters=parameters,
        ties=base.ties,
        own=base.own,
        replaced={**base.padded, **replaced(parameters, before, peft_model, placed)},
        config_edits=base.config_edits,
        notes=(*base.notes, *(note for naming in namings for note in naming.notes), *packing),
        is_lazy=is_lazy,
    )


def _unknown(base: Base) -> set[str]:
    """Return the keys whose values the base does not have, through ties."""
    keys = {*base.own, *base.padded}
    return keys | {key for pair in base.ties.items() if keys & set(pair) for key in pair}


def _peft_config(adapter: Adapter, naming: Naming) -> PeftConfig:
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.peft_type]
    known = {field.name for field in dataclasses.fields(config_class)} | HARMLESS_FIELDS
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
            why=f"This version knows {', '.join(task for task in TASK_CLASSES if task)}.",
            fix="Release the adapter unmerged for now.",
        )
    try:
        config: PeftConfig = config_class.from_pretrained(str(adapter.root))
    except (TypeError, ValueError) as error:
        raise UnsupportedAdapter(
            f"PEFT refuses {CONFIG_FILE}: {first_line(error)}",
            why="Its fields contradict each other, or were written by another version.",
            fix="Save the adapter again with the PEFT version that trained it.",
        ) from error
    config.inference_mode = True
    for field, value in naming.config.items():
        setattr(config, field, set(value) if field == "target_modules" else value)  # as PEFT holds it
    return config


def _wrap_several(
    model: PreTrainedModel, adapters: Sequence[Adapter], namings: Sequence[Naming], *, only_plans: bool
) -> PeftModel:
    """Return all adapters on the model, each loaded as strictly as one alone."""
    names = [f"part_{number}" for number in range(1, len(adapters) + 1)]
    peft_model: PeftModel | None = None
    for name, adapter, naming in zip(names, adapters, namings, strict=True):
        peft_model = _wrap(peft_model or model, _peft_config(adapter, naming), adapter, name, naming.names.values())
        placed, _ = _load(peft_model, adapter, name, naming.names, frozenset())
        extra = [key for key in placed if f".{name}" not in key]
        if lost := [key for key in extra if not (only_plans and ".base_layer." in key)]:  # no base to compare it with
            raise UnsupportedAdapter(
                f"The adapter {name.replace('_', ' ')} brings {lost[0]!r}, and several adapters are to be combined.",
                why="It is no low-rank factor, and PEFT's combination would drop it.",
                fix="Train the adapter without it, or merge it alone.",
            )
    assert peft_model is not None  # noqa: S101  (there is at least one adapter)
    return peft_model


def _wrap(
    model: PreTrainedModel | PeftModel, config: PeftConfig, adapter: Adapter, name: str, names: Iterable[str]
) -> PeftModel:
    """Return the model with an empty adapter `name` on it, beside those that it has; its tensors are called `names`."""
    wrapped: PeftModel
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(model, PeftModel):
                wrapped = model
                wrapped.add_adapter(name, config, autocast_adapter_dtype=True, low_cpu_mem_usage=False)
            else:
                wrapped = getattr(peft, TASK_CLASSES[adapter.task_type])(
                    model, config, name, autocast_adapter_dtype=True, low_cpu_mem_usage=False
                )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, NotImplementedError, ImportError) as error:
        if _leads_to_modules(model, names):
            raise UnsupportedAdapter(
                f"PEFT cannot put the adapter on {type(model).__name__}: {first_line(error)}",
                why="The base has all the modules that the adapter names, and the installed PEFT refuses one of them.",
                fix="Release the adapter unmerged, or train it without the modules or options that the message names.",
            ) from error
        raise AdapterMismatch(
            f"PEFT cannot put the adapter on {type(model).__name__}: {first_line(error)}",
            why=f"Its config is not for this model; {_said(adapter)}.",
            fix="Set `base-model` to the model that the adapter was trained on; if it is that already, set "
            "`base-revision` to the commit of the training, or save the adapter again.",
        ) from error
    return wrapped.eval()


def _leads_to_modules(model: nn.Module, names: Iterable[str]) -> bool:
    """Return whether every tensor belongs to a module of the base that holds no other, or that PEFT wrapped already."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for name in names:
        module: nn.Module = inner
        for part in name.removeprefix(PREFIX).split("."):
            if is_wrapper(module) or part not in module._modules:
                break
            module = module.get_submodule(part)
        if module is inner or (not is_wrapper(module) and any(True for _ in module.children())):
            return False
    return True


def _load(
    peft_model: PeftModel,
    adapter: Adapter,
    name: str,
    names: Mapping[str, str],
    own: Container[str],
    stacks: tuple[Single, ...] = (),
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Load the adapter and return what it changed (state-dict key of the PEFT model → tensor as stored), and notes.

    Its tensors go by `names`; the base has no values for the keys `own`, and `stacks` are those whose experts have a
    layer each in the adapter. A copy of a base tensor that only repeats the
    base (PEFT saves one beside an embedding's LoRA) is left out.
    """
    mapped = MappedFile(adapter.root / WEIGHTS_FILE, adapter.tensors)
    named = {names[key]: tensor for key, tensor in mapped.tensors.items()}
    weights, packing = as_peft_packs(peft_model, adapter.config, named)
    if stacks:
        weights, packing = pack_single_experts(peft_model, weights, stacks), (*packing, *describe(stacks))
    placed: dict[str, torch.Tensor] = {}
    load_state_dict = peft_model.load_state_dict

    def recording(state_dict: Mapping[str, torch.Tensor], strict: bool = False) -> LoadResult:  # noqa: ARG001
        check_copies(peft_model, state_dict, own)
        brought = {key: value for key, value in state_dict.items() if not repeats(peft_model, key, value, name)}
        placed.update(brought)
        return mapped.load(load_state_dict, brought)

    # PEFT maps file names to parameters inside this call; listening in on its last step is the only way to learn
    # the mapping without repeating it.
    peft_model.load_state_dict = recording
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = set_peft_model_state_dict(peft_model, weights, name)
    except KeyError as error:
        raise _missing(str(error.args[0]), adapter) from error
    except (RuntimeError, ValueError) as error:
        raise _wrong_shape(error, adapter) from error
    finally:
        del peft_model.load_state_dict
    if unplaced := [key for key in result.unexpected_keys if not (key in weights and is_repeated(key, weights))]:
        raise _unplaced(sorted(unplaced), adapter)
    missing = [key for key in result.missing_keys if _must_be_in_file(key, adapter, name)]
    if missing:
        raise _missing(missing[0], adapter)
    widen(peft_model, placed)
    return placed, packing


def _check_biases(peft_model: PeftModel, adapter: Adapter) -> None:
    """Refuse an adapter that trained biases of the base and did not save them, as PEFT up to 0.20 did."""
    bias = str(adapter.config.get("bias") or "none")
    if bias == "none" or any(name.endswith("bias") and ".lora_B." not in name for name in adapter.tensors):
        return
    model = peft_model.get_base_model()
    layers = {path: module for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    owners = {path: module.get_base_layer() for path, module in layers.items()}
    if bias == "all":
        owners = dict(model.named_modules())
    trained = [path for path, module in owners.items() if isinstance(getattr(module, "bias", None), torch.nn.Parameter)]
    if trained:
        raise UnsupportedAdapter(
            f"{CONFIG_FILE} sets `bias` to {bias[:40]!r}, but the biases of {len(trained)} modules, {trained[0]!r} "
            "first, are not in the adapter's file.",
            why="They were trained with it, and PEFT up to 0.20 did not save them; the base's are other ones.",
            fix="Save the adapter again from the trained model with PEFT 0.21, or add `lost-biases` to `allow` to "
            "keep the base's.",
        )


def _must_be_in_file(key: str, adapter: Adapter, name: str) -> bool:
    # As PEFT's load_adapter; vector banks and the like are shared, and stored once under another key.
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(adapter.peft_type, "")
    is_shared = "vblora_vector_bank" in key or ".tinylora_v." in key or ".unilora_theta_d." in key
    return bool(prefix) and prefix in key and name in key.split(".") and not is_shared


def _said(adapter: Adapter) -> str:
    """Return what the adapter says of its base, to end a sentence."""
    return f"the adapter names {adapter.base_model[:120]!r} as its base" if adapter.base_model else "it names no base"


def _unplaced(keys: list[str], adapter: Adapter) -> AdapterMismatch:
    return AdapterMismatch(
        f"Nothing in the base takes the adapter tensor {keys[0]!r}"
        + (f" (nor {len(keys) - 1} more)." if keys[1:] else "."),
        why=f"PEFT would drop the tensor silently; {_said(adapter)}.",
        fix="Set `base-model` to the model that the adapter was trained on; if it is that already, the installed PEFT "
        "has no place for the tensor in it: release the adapter unmerged.",
    )


def _missing(key: str, adapter: Adapter) -> AdapterMismatch:
    return AdapterMismatch(
        f"The adapter has no tensor for {key!r}.",
        why=f"{CONFIG_FILE} asks for it in this base; PEFT would leave it random or zero; {_said(adapter)}.",
        fix="Set `base-model` to the model that the adapter was trained on; if it is that already, save the adapter "
        "again as a whole.",
    )


def _wrong_shape(error: Exception, adapter: Adapter) -> AdapterMismatch:
    lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
    return AdapterMismatch(
        f"The adapter does not fit the base: {lines[0] if lines else first_line(error)}",
        why=f"Its shapes differ from this base's; {_said(adapter)}.",
        fix="Set `base-model` to the model that the adapter was trained on; if it is that already, set "
        "`base-revision` to the commit of the training, or save the adapter again.",
    )

"""An adapter folder, validated: its configuration, its tensors, and nothing that a merge would lose.

Covered: safetensors adapters of every PEFT method that can merge; each is refused here, before the base is
touched, when the folder is incomplete, a tensor is not finite, or the method has no exact merge.
Not covered here: whether its tensors fit a base (`runner.worker.model.attach` places every one of them).

No torch: the supervisor reads adapters before it downloads a base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from runner.files.adapter.fields import check_fields, check_rank
from runner.files.adapter.methods import FACTORS, find_refusal
from runner.files.layout import TensorFile, TensorInfo, read_tensor_file
from runner.files.pointers import is_pointer, pointer_problem
from runner.files.readable import folder_problem
from runner.protocol.errors import BrokenAdapter, CheckpointError, UnsupportedAdapter
from runner.protocol.syntax import parse_json

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"  # the one name that `pickle` in `allow` is for
SCAN_BYTES = 4 << 20

_EXPONENT = MappingProxyType(
    {
        "BF16": ("<u2", 0x7F80),
        "F16": ("<u2", 0x7C00),
        "F32": ("<u4", 0x7F800000),
        # Rounded to float32 by `runner.supervisor.modernised`, as PEFT does when it loads it.
        "F64": ("<u8", 0x7FF0000000000000),
    }
)
_MLX_FILE = "adapters.safetensors"
_MLX_FIELDS = ("lora_parameters", "fine_tune_type")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A PEFT adapter on disk.

    Attributes:
        root: the folder.
        config: adapter_config.json, as parsed.
        peft_type: for example "LORA".
        task_type: for example "CAUSAL_LM", or None.
        base_model: what the adapter says that it was trained on; a hint, never followed silently.
        tensors: by their names in the file.
    """

    root: Path
    config: Mapping[str, Any]
    peft_type: str
    task_type: str | None
    base_model: str | None
    tensors: Mapping[str, TensorInfo]

    @property
    def data_bytes(self) -> int:
        """Bytes of all adapter tensors as stored."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def read_adapter(root: Path) -> Adapter:
    """Return the adapter in `root`; reads its config, its header, and every weight once to see that it is finite.

    Raises:
        BrokenAdapter: a file is missing, pickled, truncated or not finite.
        UnsupportedAdapter: a method or option that has no exact merge, or an adapter that changes nothing.
    """
    if problem := folder_problem(root):
        raise _broken(f"In the adapter's folder, {problem}")
    config = _read_config(root)
    _check_program(root, config)
    check_fields(config)
    peft_type = str(config.get("peft_type") or "")
    _check_method(config)
    file = _read_weights(root)
    check_rank(config, (tensor.shape for tensor in file.tensors))
    zeros = _check_values(root, file)
    _check_effect(peft_type, [tensor.name for tensor in file.tensors], zeros)
    base_model = config.get("base_model_name_or_path")
    task_type = config.get("task_type")
    return Adapter(
        root=root,
        config=MappingProxyType(config),
        peft_type=peft_type,
        task_type=str(task_type) if task_type else None,
        base_model=str(base_model) if base_model else None,
        tensors={tensor.name: tensor for tensor in file.tensors},
    )


def _read_config(root: Path) -> dict[str, Any]:
    path = root / CONFIG_FILE
    try:
        if is_pointer(path):
            problem = pointer_problem(CONFIG_FILE)
            raise BrokenAdapter(problem.what, why=problem.why, fix=problem.fix)
        config = parse_json(path.read_bytes())
    except FileNotFoundError as error:
        raise _no_adapter(root) from error
    except (OSError, ValueError) as error:
        raise _broken(f"{CONFIG_FILE} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise _broken(f"{CONFIG_FILE} is not a JSON object.")
    return config


def _check_program(root: Path, config: Mapping[str, Any]) -> None:
    if "peft_type" in config or not ((root / _MLX_FILE).exists() or any(field in config for field in _MLX_FIELDS)):
        return
    raise UnsupportedAdapter(
        "The adapter was saved by mlx, not by PEFT.",
        why="Its factors are transposed and named otherwise, and its `scale` stands for alpha/r.",
        fix="Fuse it with mlx-lm, which wrote it, or convert it to PEFT's format first.",
    )


def _check_method(config: Mapping[str, Any]) -> None:
    refusal = find_refusal(config)
    if refusal is not None:
        raise UnsupportedAdapter(
            f"The adapter {refusal.subject}, which cannot be merged.",
            why=f"{refusal.reason[0].upper()}{refusal.reason[1:]}.",
            fix="Release the adapter as an adapter, or train one of a method that changes weights, such as plain LoRA.",
        )


def _read_weights(root: Path) -> TensorFile:
    if not (root / WEIGHTS_FILE).is_file():
        pickled = (root / _PICKLED_FILE).is_file()
        raise BrokenAdapter(
            f"The adapter folder has no {WEIGHTS_FILE}" + (f", only {_PICKLED_FILE}." if pickled else "."),
            why="Only safetensors are read: unpickling can run code.",
            fix="Save it again with PEFT's `save_pretrained`"
            + (", or add `pickle` to `allow`: tensors only, in a process of its own." if pickled else "."),
        )
    try:
        file = read_tensor_file(root, WEIGHTS_FILE)
    except CheckpointError as error:
        raise BrokenAdapter(error.problem.what, why=error.problem.why, fix=error.problem.fix) from error
    if not file.tensors:
        raise _broken(f"{WEIGHTS_FILE} holds no tensor.")
    if empty := [tensor.name for tensor in file.tensors if tensor.shape == (0,)]:
        raise BrokenAdapter(
            f"{len(empty)} of {len(file.tensors)} adapter tensors are empty, of shape [0]; the first is {empty[0]!r}.",
            why="They were saved under DeepSpeed ZeRO-3 without gathering: their values are not in this file.",
            fix="Gather them when saving, with `stage3_gather_16bit_weights_on_model_save: true` in the DeepSpeed "
            "config and `accelerator.get_state_dict(model)` as the `state_dict` of `save_pretrained`; a checkpoint of "
            "that training may still hold them.",
        )
    for tensor in file.tensors:
        if tensor.dtype not in _EXPONENT and not tensor.dtype.startswith(("I", "U", "BOOL")):
            raise UnsupportedAdapter(
                f"The adapter tensor {tensor.name!r} is stored as {tensor.dtype}.",
                why="Adapters are merged in float32, which holds BF16, F16 and F32 exactly, and this not.",
                fix="Save the adapter in float32, bfloat16 or float16.",
            )
    return file


def _check_values(root: Path, file: TensorFile) -> set[str]:
    """Refuse what is not finite, and return the names of float tensors that are all zero."""
    # numpy has no bfloat16, so the test is on the bits: all exponent bits set means Inf or NaN.
    import numpy as np

    zeros = set()
    with (root / file.name).open("rb") as stream:
        for tensor in file.tensors:
            if tensor.dtype not in _EXPONENT:
                continue
            is_zero = True
            word, mask = _EXPONENT[tensor.dtype]
            stream.seek(tensor.start)
            left = tensor.size_bytes
            while left:
                block = stream.read(min(SCAN_BYTES, left))
                left -= len(block)
                values = np.frombuffer(block, dtype=word)
                is_zero = is_zero and not bool((values << 1).any())  # without the sign
                if bool(((values & mask) == mask).any()):
                    raise BrokenAdapter(
                        f"The adapter tensor {tensor.name!r} holds NaN or Inf.",
                        why="The training diverged, or the file was damaged; merged, it would poison the base.",
                        fix="Take an earlier checkpoint of the training.",
                    )
            if is_zero:
                zeros.add(tensor.name)
    return zeros


def _check_effect(peft_type: str, names: Collection[str], zeros: Collection[str]) -> None:
    """Refuse an adapter of which every tensor is zero, or is multiplied by one that is."""
    factors = FACTORS.get(peft_type, ())
    modules = {name: _module_of_factor(name, factors) for name in names}
    null = {modules[name] for name in zeros}
    if factors and all(name in zeros or (modules[name] and modules[name] in null) for name in names):
        raise UnsupportedAdapter(
            f"The adapter changes nothing: each of its {len(names)} tensors is zero or is multiplied by zero, "
            f"{min(zeros)!r} first.",
            why="It was saved before it was trained, or its training never reached it; a release would be the base.",
            fix="Take a checkpoint from the end of the training.",
        )


def _module_of_factor(name: str, factors: tuple[str, ...]) -> str:
    parts = name.split(".")
    return next((".".join(parts[:at]) for at, part in enumerate(parts) if part.startswith(factors)), "")


def _no_adapter(root: Path) -> BrokenAdapter:
    inside = [path.parent.name for path in root.glob(f"*/{CONFIG_FILE}")]
    inside.sort(key=lambda name: (int("0" + "".join(filter(str.isdecimal, name))), name))
    if inside:
        return BrokenAdapter(
            f"The adapter folder has no {CONFIG_FILE}, but its subfolders have: {', '.join(inside[:5])}.",
            why="Which of them is the adapter is not guessed: the last checkpoint of a training need not be its best.",
            fix=f"Point `adapter-path` at the subfolder that you want, for example {str(root / inside[-1])!r}.",
        )
    if (root / "config.json").is_file():
        return BrokenAdapter(
            f"The adapter folder has no {CONFIG_FILE}: it holds a whole model.",
            why="An adapter is merged into a model, not a model into another.",
            fix="Point `adapter-path` at the adapter. A model that is merged already is judged with `mode: verify` and "
            "`merged-path`.",
        )
    return BrokenAdapter(
        f"The adapter folder has no {CONFIG_FILE}.",
        why="A PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors.",
        fix="Point `adapter-path` at the folder that `save_pretrained` of the PEFT model wrote.",
    )


def _broken(what: str) -> BrokenAdapter:
    return BrokenAdapter(
        what,
        why="The adapter folder was not written, or not copied, as a whole.",
        fix="Save or download the adapter again.",
    )

"""What lies in an adapter's folder beside the adapter, and whether any of it is a part of what was trained. No torch.

What a training leaves behind is known by name and is left there. What else holds tensors may be what the trained model
needs, and a merge reads the adapter alone: it is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from runner.files.layout import read_tensor_file
from runner.files.sidecars.folders import files_of, module_folders
from runner.files.sidecars.names import ASIDE, CONFIG, folder_of, is_hidden, is_own, is_weights, lone_pickles
from runner.protocol.errors import CheckpointError, UnsupportedAdapter

VALUE_HEAD = "value-head"  # of the input `allow`
MAX_NAMED = 5
# What a training needs to go on, and nothing of the model: states of optimizers and of random numbers, arguments, logs.
_OF_THE_TRAINING = re.compile(
    r"optimizer[^/]*|scheduler[^/]*|scaler[^/]*|rng_state[^/]*|random_states[^/]*|training_args\.bin|sampler[^/]*"
    r"|dataloader[^/]*|zero_pp_rank[^/]*optim_states\.pt|bf16_zero_pp_rank[^/]*optim_states\.pt|events\.out\.[^/]*"
)
_FOLDERS = re.compile(r"(checkpoint|global_step|step|epoch)[-_]?\d+/|(wandb|logs|optimizer)/")
_FOREIGN = (".gguf", ".ggml", ".onnx", ".onnx_data", ".tflite")  # made of a merged model
_MODEL = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|tf_model\.h5|flax_model\.msgpack"
)
_TENSORS = (".npy", ".distcp", ".nemo")  # beside what may be weights anywhere
_VALUE_HEAD = re.compile(r"(value_?head|v_head)[^/]*")
_OF_A_VALUE_HEAD = re.compile(r"([^.]+\.)*(value_?head|v_head)\.")  # the name of a tensor
_MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "non_lora_trainables": "LLaVA's training saves there what it trained beside the LoRA, such as the projector.",
        "trainable_params": "LongLoRA's training saves there the embeddings and norms that it trained beside the LoRA.",
        "new_embeddings": "The rows that a training gave to new tokens are there.",
        "pytorch_model": "Without a config.json it is no model of its own; TRL saves a trained head there.",
    }
)


def check_leftovers(root: Path, allowed: Container[str]) -> None:
    """Refuse an adapter's folder with trained state beside the adapter.

    Args:
        root: the adapter's folder.
        allowed: names of the input `allow`: "value-head", and "pickle" for modules of sentence-transformers.

    Raises:
        UnsupportedAdapter: a file holds, or may hold, what was trained, and nothing says how it is to be merged.
    """
    paths = files_of(root)
    modules = module_folders(root)
    found = list(trained_state(paths, modules))
    heads = [path for path in found if _is_value_head(root, path)]
    if len(heads) < len(found):
        raise _refusal(sorted(found, key=lambda path: path in heads))
    if heads and VALUE_HEAD not in allowed:
        raise UnsupportedAdapter(
            f"{_listed(heads)}, beside the adapter, is a value head.",
            why="It scored texts in the training; a model that generates has no place for it.",
            fix="Add `value-head` to `allow`, and the model is released without it.",
        )
    for path in lone_pickles(paths, modules) if "pickle" not in allowed else ():
        raise UnsupportedAdapter(
            f"{path} of the adapter is a pickle, and there are no safetensors beside it.",
            why="modules.json names that folder, so its weights belong in the release, and unpickling can run code.",
            fix="Add `pickle` to `allow`, and the file is carried as it is; or save the model again with "
            "sentence-transformers, which writes safetensors.",
        )


def trained_state(paths: Collection[str], modules: Iterable[str]) -> Iterator[str]:
    """Yield the files of an adapter's folder that may hold what was trained, and that no merge reads.

    Args:
        paths: every file.
        modules: the folders of sentence-transformers' modules, whose weights are carried.
    """
    adapters = {folder_of(path) for path in paths if path.endswith("/adapter_config.json")}  # others, under their names
    models = {folder_of(path) for path in paths if path.rpartition("/")[2] == CONFIG}
    carried = (*modules, *adapters)
    for path in paths:
        name = path.rpartition("/")[2]
        is_model = folder_of(path) in models and _MODEL.fullmatch(name)
        if not (is_weights(path) or name.endswith(_TENSORS)) or is_own(path) or path.startswith(carried) or is_model:
            continue
        if not (is_hidden(path) or _is_known(path, name)):
            yield path


def _is_value_head(root: Path, path: str) -> bool:
    """Return whether a file is a value head: by its name, or by the names of all its tensors where they can be read."""
    if _VALUE_HEAD.fullmatch(path):
        return True
    if not path.endswith(".safetensors"):  # a pickle is not opened
        return False
    try:
        tensors = read_tensor_file(root, path).tensors
    except CheckpointError:  # damaged, or a stand-in for what was not downloaded: nothing says that it is one
        return False
    return bool(tensors) and all(_OF_A_VALUE_HEAD.match(tensor.name) for tensor in tensors)


def _is_known(path: str, name: str) -> bool:
    is_copy = name in ("adapter_model.bin", "adapter_config.json")
    is_aside = ASIDE.match(path) or _FOLDERS.match(path)
    return bool(is_copy or is_aside or name.endswith(_FOREIGN) or _OF_THE_TRAINING.fullmatch(name))


def _refusal(paths: list[str]) -> UnsupportedAdapter:
    meanings = [said for start, said in _MEANINGS.items() if paths[0].startswith(start)]
    return UnsupportedAdapter(
        f"{_listed(paths)}, beside the adapter, may hold what was trained.",
        why=" ".join((*meanings, "A merge reads the adapter alone, and without the rest it is not the trained model.")),
        fix="Save those parts in the adapter (PEFT's `modules_to_save` or `trainable_token_indices`). If they are none "
        "of the model, give a copy of the folder without them as `adapter-path`.",
    )


def _listed(paths: list[str]) -> str:
    shown = [path if path.isprintable() else ascii(path) for path in paths[:MAX_NAMED]]
    return ", ".join(shown) + (f" and {len(paths) - MAX_NAMED} more" if len(paths) > MAX_NAMED else "")

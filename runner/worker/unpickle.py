"""A program: pickled weights, written again as safetensors. `python -m runner.worker.unpickle SOURCE TARGET WEIGHTS`.

It runs in a process of its own, without tokens (`runner.supervisor.launch.unpickle`), and only where the user allows
it. torch's `weights_only` unpickler builds tensors and plain containers and refuses everything else; files are mapped,
so that one tensor is in memory at a time (files older than torch 1.6 cannot be mapped, and are in memory as a whole).

Each file becomes one of the same tensors in the same order. An error goes to standard output, as the worker's do.
"""

from __future__ import annotations

import json
import os
import pickle  # for its exception; nothing is loaded with it
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

from runner.files.layout import INDEX_FILE, build_header
from runner.files.pickled import PICKLED_INDEX, converted_name, pickled_files
from runner.files.sidecars.folders import module_folders
from runner.files.sidecars.names import is_own, is_pickle, is_weights, lone_pickles
from runner.protocol.errors import BrokenCheckpoint, RunnerError, UnsupportedCheckpoint
from runner.protocol.events import Failed, encode
from runner.protocol.syntax import parse_json
from runner.worker.tensors.reader import TORCH_DTYPES, tensor_bytes

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def main(arguments: list[str]) -> int:
    """Convert the folder; return the exit code of its error's family, or 0."""
    source, target, weights = arguments
    try:
        unpickle(Path(source), Path(target), weights)
    except RunnerError as error:
        sys.stdout.write(encode(Failed(family=type(error).__name__, problem=error.problem)))
        return error.exit_code
    return 0


def unpickle(source: Path, target: Path, weights: str) -> None:
    """Write the folder `target`: weights as safetensors, and copies of the other files of `source` but weights.

    Args:
        source: the folder.
        target: the folder to make.
        weights: the file in `source` that holds the weights, or their index.

    Raises:
        UnsupportedCheckpoint: a pickle holds more than tensors.
        BrokenCheckpoint: a pickle is damaged, or contradicts the index.
    """
    names = [path.relative_to(source).as_posix() for path in sorted(source.rglob("*")) if path.is_file()]
    files = pickled_files(source, weights)
    target.mkdir(parents=True)
    where: dict[str, str] = {}
    total = 0
    for file in files:
        tensors = _load(source / file)
        for name in tensors:
            if name in where:
                raise _broken(file, f"{name!r} is also in {where[name]}")
        total += _write(target / converted_name(file), tensors)
        where |= dict.fromkeys(tensors, file)
        del tensors
    if weights == PICKLED_INDEX:
        _write_index(source, target, where, total)
    _copy_rest(source, target, [name for name in names if name not in (*files, weights)])


def _copy_rest(source: Path, target: Path, names: list[str]) -> None:
    """Copy what is no weights, and those of modules; what else there is stays visible by its name, as an empty file."""
    modules = module_folders(source)
    lone = lone_pickles(names, modules)
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if not is_weights(name) or is_own(name) or (name.startswith(modules) and (not is_pickle(name) or name in lone)):
            shutil.copyfile(source / name, target / name)
        elif name != INDEX_FILE:
            (target / name).touch()


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpoint(
            f"{path.name} holds more than tensors: {_reason(error)}",
            why="To unpickle anything else could run code, so torch's weights-only loader refuses it.",
            fix="Use a source that you trust, with safetensors; such a file is a training state at best.",
        ) from error
    except FileNotFoundError as error:
        raise _broken(path.name, "the index names it, and it is not there") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise _broken(
            path.name, str(error).strip().splitlines()[0][:200] if str(error).strip() else "damaged"
        ) from error
    if not isinstance(held, dict) or not held:
        raise _strange(path.name, f"a {type(held).__name__} instead of tensors by name")
    for name, value in held.items():
        if not isinstance(name, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise _strange(path.name, f"a {type(value).__name__} under {str(name)[:80]!r}")
        if value.layout is not torch.strided or value.dtype not in _NAMES:
            raise _strange(path.name, f"{str(name)[:80]!r} as {value.dtype}, {value.layout}")
    return dict(held)


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    header = build_header(
        ((name, _NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()), {"format": "pt"}
    )
    written = 0
    with path.open("wb") as file:
        file.write(header)
        for tensor in tensors.values():
            if tensor.numel():
                written += file.write(tensor_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
    return written


def _write_index(source: Path, target: Path, where: Mapping[str, str], total: int) -> None:
    index = parse_json((source / PICKLED_INDEX).read_bytes())
    stated = {str(name): str(file) for name, file in index["weight_map"].items()}
    if stated != dict(where):
        name = min(name for name in {*stated, *where} if stated.get(name) != where.get(name))
        raise _broken(
            stated.get(name, where.get(name, "")), f"{PICKLED_INDEX} and the files do not agree on where {name!r} is"
        )
    weight_map = {name: converted_name(file) for name, file in stated.items()}
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (target / INDEX_FILE).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return (lines[0] if lines else str(error).strip().splitlines()[0])[:200]


def _strange(file: str, what: str) -> UnsupportedCheckpoint:
    return UnsupportedCheckpoint(
        f"{file} holds {what}.",
        why="Weights are plain tensors by name; what this is to mean cannot be told.",
        fix="Save the model again with `save_pretrained`, which writes safetensors.",
    )


def _broken(file: str, reason: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(
        f"{file} cannot be unpickled: {reason}.",
        why="The download or the save was cut short, or the file is no torch checkpoint.",
        fix="Download it again, or use a revision with safetensors.",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

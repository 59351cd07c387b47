"""Damages of the files beside the weights: every file of ten layouts lost and changed, and strangers added.

    python -m bench.faults.files

prints one line for each layout, and each damage that was not caught or not named by its file. No model runs, so that it
takes seconds.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.faults.layouts import LAYOUTS, write_layout
from runner.checkpoint.layout import read_checkpoint
from runner.errors import CheckpointError
from runner.verify.files import judge_files
from runner.verify.verdict import Outcome

Damage = Callable[[Path], None]
NOT_CARRIED = ("README.md", ".gitattributes")
# Judged with the weights: what a folder computes.
WEIGHTS = ("config.json", "model.safetensors")


def _lose(path: Path) -> None:
    path.unlink()


def _change(path: Path) -> None:
    """Change what the file says, in a way that its kind can have."""
    if path.suffix == ".json":
        content = json.loads(path.read_bytes())
        content = [*content, {"idx": 9}] if isinstance(content, list) else {**content, "changed": 1}
        if path.name == "tokenizer.json":
            content = {**json.loads(path.read_bytes()), "decoder": None}
        if path.name == "tokenizer_config.json":
            content |= {"eos_token": "<s>"}
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(path.read_bytes() + b"x")


def _flip(path: Path) -> None:
    """Flip a bit in the middle; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _link_away(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


EACH: Mapping[str, Damage] = {
    "lost": _lose, "changed": _change, "a bit flipped": _flip, "emptied": _empty, "a link to a device": _link_away,
}  # fmt: skip
ADDED: Mapping[str, bytes] = {
    "pytorch_model.bin": b"PK", "model.gguf": b"GGUF", "extra/model.safetensors": b"\0" * 8, "model.onnx": b"onnx",
    "adapter_config.json": b"{}", "adapter_model.safetensors": b"\0" * 8, "training_args.bin": b"PK",
    "modeling_other.py": b"print()", "layers/other.py": b"print()", "model.safetensors.index.json": b"{}",
    "vocab.bpe": b"a", "additional_chat_templates/evil.jinja": b"{{ 1 }}", "video_processor.json": b"{}",
    "image_processor_config.json": b"{}", "sentence_xlnet_config.json": b"{}", "adapter/adapter_config.json": b"{}",
    "notes.bak": b"x", "odd\nname.py": b"", "flax_model.msgpack": b"x", "extra.tiktoken": b"x",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One damage, and what the judge said.

    Attributes:
        layout: of the folder.
        path: of the file.
        how: what was done to it.
        is_caught: whether a check failed.
        is_named: whether a failed check names the file.
    """

    layout: str
    path: str
    how: str
    is_caught: bool
    is_named: bool


def damages(base: Path) -> Iterator[tuple[str, str, Damage]]:
    """Yield (path, how, damage) of a right folder that is a copy of `base`."""
    for file in sorted(base.rglob("*")):
        path = file.relative_to(base).as_posix()
        if file.is_file() and path not in (*NOT_CARRIED, *WEIGHTS):
            yield from ((path, how, damage) for how, damage in EACH.items())
    for path, content in ADDED.items():
        if not (base / path).exists():
            yield path, "added", lambda place, content=content: _add(place, content)  # type: ignore[misc]


def _add(place: Path, content: bytes) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)


def failed(base: Path, merged: Path) -> list[str]:
    """Return what the judge says of a folder's files, where it fails them."""
    try:
        checkpoint = read_checkpoint(merged)
    except CheckpointError as error:  # the judge's first check: what the folder's headers say
        return [error.problem.what]
    checks = judge_files(base, (base / "no adapter",), checkpoint, rows=None)
    return [check.detail for check in checks if check.outcome is Outcome.FAIL]


def judge_damages(layout: str, base: Path, scratch: Path) -> Iterator[Result]:
    """Yield the result of every damage of a layout; the right folder comes first and must not fail.

    Raises:
        AssertionError: the right folder fails.
    """
    right = Path(shutil.copytree(base, scratch / "right"))
    for path in NOT_CARRIED:
        (right / path).unlink()
    if said := failed(base, right):
        raise AssertionError(f"{layout}: the right folder fails: {said}")
    for path, how, damage in damages(base):
        folder = Path(shutil.copytree(right, scratch / "damaged"))
        damage(folder / path)
        said = failed(base, folder)
        shown = path if path.isprintable() else ascii(path)
        is_named = any(shown in detail for detail in said)
        yield Result(layout=layout, path=path, how=how, is_caught=bool(said), is_named=is_named)
        shutil.rmtree(folder)


def main() -> int:
    """Judge all damages of all layouts; return 1 where one was missed."""
    missed = 0
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as made:
            results = list(judge_damages(layout, write_layout(layout, Path(made) / "base"), Path(made)))
        bad = [result for result in results if not result.is_named]
        print(f"{layout}: {len(results)} damages, {len(results) - len(bad)} caught and named", flush=True)
        for result in bad:
            print(f"  {'not named' if result.is_caught else 'MISSED'}: {result.path!r} {result.how}")
        missed += len(bad)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

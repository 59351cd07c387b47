"""Damages of the files beside the weights: every file of ten layouts lost and changed, and strangers added.

    python -m bench.faults.files         folders: no model runs, so that it takes seconds
    python -m bench.faults.files --hub   each also as a repository of a Hub, which `merged-path` may name: minutes

prints one line for each layout, and each damage that was not caught, not named by its file, or told in other words of a
repository than of the folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from bench.faults.layouts import LAYOUTS, write_layout
from runner.files.layout import read_checkpoint
from runner.judge.sidecars.files import judge_files
from runner.protocol.errors import CheckpointError
from runner.protocol.repo_ref import RepoRef
from runner.protocol.verdict import Outcome
from runner.supervisor.hub import connect
from tests.hub.server import LocalHub

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
ONLY_IN_FOLDERS = ("a link to a device",)  # a repository holds files
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
        is_alike: whether the same is said of it as a repository on a Hub; true where no Hub was asked.
    """

    layout: str
    path: str
    how: str
    is_caught: bool
    is_named: bool
    is_alike: bool = True

    @property
    def problem(self) -> str:
        """What is wrong with the judgement, or ""."""
        if not self.is_caught:
            return "MISSED"
        return "not named" if not self.is_named else "" if self.is_alike else "not alike on a Hub"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OnHub:
    """A Hub that is given folders to judge as repositories, and the cache that they are downloaded to."""

    hub: LocalHub
    cache: Path

    def failed(self, base: Path, folder: Path, name: str) -> list[str]:
        """Return what `mode: verify` says of the folder's files with `merged-path: acme/NAME@main`, as `failed`."""
        self.hub.add_model(f"acme/{name}", folder)
        reading = connect(self.hub.endpoint, token=None)
        ref = RepoRef(repo_id=f"acme/{name}", revision="main")
        try:
            root = reading.snapshot(ref, kind="merged", cache_dir=self.cache).root
        except CheckpointError as error:
            return [error.problem.what]
        return failed(base, root)


def judge_damages(layout: str, base: Path, scratch: Path, on_hub: OnHub | None = None) -> Iterator[Result]:
    """Yield the result of every damage of a layout; the right folder comes first and must not fail.

    Raises:
        AssertionError: the right folder fails.
    """
    right = Path(shutil.copytree(base, scratch / "right"))
    for path in NOT_CARRIED:
        (right / path).unlink()
    _demand_silence(layout, base, right, on_hub)
    for number, (path, how, damage) in enumerate(damages(base)):
        folder = Path(shutil.copytree(right, scratch / "damaged"))
        damage(folder / path)
        said = failed(base, folder)
        alike = True
        if on_hub is not None and how not in ONLY_IN_FOLDERS:
            alike = said == on_hub.failed(base, folder, f"{_slug(layout)}-{number}")
        shown = path if path.isprintable() else ascii(path)
        is_named = any(shown in detail for detail in said)
        yield Result(layout=layout, path=path, how=how, is_caught=bool(said), is_named=is_named, is_alike=alike)
        shutil.rmtree(folder)


def _demand_silence(layout: str, base: Path, right: Path, on_hub: OnHub | None) -> None:
    said = failed(base, right) + (on_hub.failed(base, right, f"{_slug(layout)}-right") if on_hub else [])
    if said:
        raise AssertionError(f"{layout}: the right folder fails: {said}")


def _slug(layout: str) -> str:
    return layout.replace(" ", "-")


def main() -> int:
    """Judge all damages of all layouts; return 1 where one was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults.files", description=__doc__.splitlines()[0])
    parser.add_argument("--hub", action="store_true", help="judge each also as a repository on a Hub")
    is_hub, missed = parser.parse_args().hub, 0
    for layout in LAYOUTS:
        with ExitStack() as stack:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            on_hub = stack.enter_context(a_hub(made)) if is_hub else None
            results = list(judge_damages(layout, write_layout(layout, made / "base"), made, on_hub))
        bad = [result for result in results if result.problem]
        asked = sum(is_hub and result.how not in ONLY_IN_FOLDERS for result in results)
        print(f"{layout}: {len(results)} damages ({asked} on a Hub), {len(results) - len(bad)} right", flush=True)
        for result in bad:
            print(f"  {result.problem}: {result.path!r} {result.how}")
        missed += len(bad)
    return 1 if missed else 0


@contextmanager
def a_hub(root: Path) -> Iterator[OnHub]:
    """Run a Hub with its files below `root`."""
    with LocalHub.start(root / "hub") as hub:
        yield OnHub(hub=hub, cache=root / "cache")
        huggingface_hub.close_session()  # the server waits for open connections


if __name__ == "__main__":
    sys.exit(main())

"""A program: folders that a seeded generator damages, each judged or merged in a process of its own, with bounds.

`python -m tests.security.fuzz_folders [COUNT] [FIRST_SEED]`. Each case must end with a verdict or a named error, within
`WALL_S` and `MEMORY_BYTES`; a traceback, a crash or a hang is a finding, and the exit code is 1.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.files.adapter.folder import read_adapter
from runner.files.layout import read_checkpoint
from runner.protocol.errors import RunnerError
from runner.protocol.events import Event, Job, Judged
from runner.protocol.limits import Evaluation, Limits
from runner.protocol.rounding import Rounding
from runner.worker.main import run
from runner.worker.merge.job import merge
from runner.worker.merge.prepare import prepare
from tests.judge.tiny import lora, save_adapter, save_base, tokenizer
from tests.security.damage import rewrite_header

WALL_S = 60.0
MEMORY_BYTES = 4 << 30
HUGE = (10**6, 10**9, -1, 0, 2**31, 2**63, 10**30, 10**400, 1e308, -0.5)
ODD = ("", "../../etc/passwd", "\u202eevil", "\x00", "é" * 5000, "None", "float8", "🙂")
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if false %}x{% endif %}{% endfor %}{% endfor %}",
    "{% set s = namespace(t='x' * 1024) %}{% for a in range(40) %}{% set s.t = s.t ~ s.t %}{% endfor %}{{ s.t }}",
    "{{ 'x' * 10 ** 12 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}",
    "{% unclosed",
)
TOKEN_RULES = (
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000}},
    {"normalizer": {"type": "Prepend", "prepend": "x" * 1_000_000}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}},
    {"decoder": {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 100_000}},
    {"model": {"type": "BPE", "vocab": {"a": 4_294_967_295}, "merges": [["a", "b"]]}},
    {"added_tokens": [{"id": -1, "content": ""}]},
)

Damage = Callable[[Path, random.Random], str]


@dataclass(frozen=True, kw_only=True)
class Models:
    """Sound folders to damage copies of."""

    base: Path
    adapter: Path
    merged: Path


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a case ended: `result` is a status, the class of a `RunnerError`, or "crash" or "hang"."""

    what: str
    result: str
    detail: str
    wall_s: float
    rss_bytes: int

    @property
    def is_sound(self) -> bool:
        return self.result not in ("crash", "hang") and self.rss_bytes <= MEMORY_BYTES


def make_models(root: Path) -> Models:
    """Return a tiny base in shards with a tokenizer and a generation config, its adapter, and their merge."""
    base = save_base(root / "base", "llama")
    tokenizer().save_pretrained(str(base))
    (base / "generation_config.json").write_text('{"eos_token_id": 2}')
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    adapter = save_adapter(root / "adapter", base, lora())
    merge(prepare(base, adapter, dtype="auto"), into=root / "merged")
    return Models(base=base, adapter=adapter, merged=root / "merged")


def _files(folder: Path, *suffixes: str) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.endswith(suffixes or ("",)))


def flip_bytes(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 3, 50))):
        if content:
            content[chance.randrange(min(len(content), chance.choice((64, 4096, 1 << 30))))] = chance.randrange(256)
    path.write_bytes(content)
    return f"bytes of {path.name} flipped"


def truncate(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size + 1) if chance.random() < 0.7 else 0])
    return f"{path.name} truncated"


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


def change_json(folder: Path, chance: random.Random) -> str:
    names = ("config.json", "config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")
    there = [name for name in names if (folder / name).is_file()]
    path = folder / chance.choice(there or [_files(folder, ".json")[0].name])
    content = json.loads(path.read_text())
    told = []
    for _ in range(chance.choice((1, 1, 2))):
        place = chance.choice(list(_places(content)))
        holder = content
        for key in place[:-1]:
            holder = holder[key]
        value: object = chance.choice(
            (chance.choice(HUGE), chance.choice(ODD), None, [], {}, True, float("nan"), _nested(80))
        )
        holder[place[-1]] = value
        told.append(f"{'.'.join(map(str, place))} = {str(value)[:30]!r}")
    path.write_text(json.dumps(content))
    return f"{path.name}: {', '.join(told)}"


def replace_text(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder, ".json", ".jinja"))
    text = chance.choice(("[]", "null", "1", '"x"', "{" * 50_000, "[" * 100_000 + "]" * 100_000, "NaN", "\ufeff{}",
                          '{"a": 1, "a": 2}', "{}", "9" * 5000, "\ud7ff\x00"))  # fmt: skip
    path.write_text(text)
    return f"{path.name} is {text[:20]!r}"


def replace_file(folder: Path, chance: random.Random) -> str:
    path = chance.choice(_files(folder))
    kind = chance.choice(("pipe", "folder", "/dev/zero", "/dev/full", "/proc/self/mem", "loop", "nothing", "long"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(1 << 30)
    else:
        path.symlink_to({"loop": path.name, "nothing": "absent"}.get(kind, kind))
    return f"{path.name} is {kind}"


def damage_header(folder: Path, chance: random.Random) -> str:
    path = _files(folder, ".safetensors")[0]
    number, kind = chance.choice((-1, 2**40, 2**63, 10**30)), chance.randrange(7)

    def change(header: dict[str, Any]) -> None:
        name = chance.choice([name for name in header if name != "__metadata__"])
        if kind == 0:
            header[name]["data_offsets"][chance.randrange(2)] = number
        elif kind == 1:
            header[name]["shape"] = [number, *header[name]["shape"][1:]]
        elif kind == 2:
            header[name]["dtype"] = chance.choice(("F64", "I8", "F8_E5M2", "C64", "X", None, "F4"))
        elif kind == 3:
            header[f"{name}{chance.choice(ODD)}"] = header.pop(name)
        elif kind == 4:
            del header[name]
        elif kind == 5:
            header["__metadata__"] = chance.choice(([], {"a": 1}, "x", {"format": "tf"}))
        else:
            header[name]["shape"] = list(reversed(header[name]["shape"])) + [1] * chance.choice((0, 1, 70))

    rewrite_header(path, change)
    return f"header of {path.name}, kind {kind}"


def hostile_words(folder: Path, chance: random.Random) -> str:
    if chance.random() < 0.5 or not (folder / "tokenizer.json").is_file():
        text = chance.choice(TEMPLATES)
        (folder / "chat_template.jinja").write_text(text)
        return f"template {text[:40]!r}"
    rule = chance.choice(TOKEN_RULES)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **rule}))
    return f"tokenizer with {str(rule)[:40]!r}"


def add_index(folder: Path, chance: random.Random) -> str:
    entries: Any = chance.choice((
        {f"t{number}": "model.safetensors" for number in range(200_000)},
        {"a": "../x.safetensors"}, {"a": 1}, [], None, {"": ""}, {"a": "x\x00.safetensors"},
        {"a": "é" * 400 + ".safetensors"},
    ))  # fmt: skip
    weights = folder / "model.safetensors"
    if weights.is_file():
        weights.rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    return f"index of {str(entries)[:40]}"


DAMAGES: Sequence[Damage] = (
    flip_bytes, truncate, change_json, change_json, change_json, replace_text, replace_file, damage_header,
    hostile_words, add_index,
)  # fmt: skip


def case(seed: int, models: Models, folder: Path) -> Ended:
    """Damage a copy in `folder`, and return how the product ended with it."""
    chance = random.Random(seed)
    for name in ("base", "adapter", "merged"):
        shutil.copytree(getattr(models, name), folder / name)
    which = chance.choice(("base", "adapter", "merged", "merged", "both"))
    told = ""
    damage = chance.choice(DAMAGES)
    for name in ("base", "merged") if which == "both" else (which,):
        told = damage(folder / name, random.Random(seed))
    mode = "verify" if which in ("merged", "both") else chance.choice(("verify", "plan", "publish"))
    return _bounded(f"{seed} {mode} {which}: {told}", lambda: product(folder, mode))


def product(folder: Path, mode: str) -> str:
    """Do what supervisor and worker do with local folders; return the verdict's status, or "planned"."""
    read_adapter(folder / "adapter")
    read_checkpoint(folder / "base")
    merged = folder / ("merged" if mode == "verify" else "out")
    events: list[Event] = []
    job = Job(
        base=folder / "base", adapters=(folder / "adapter",), combination=None, merged=merged, merges=mode == "publish",
        verifies=mode != "plan", dtype="auto", rounding=Rounding(), evaluation=Evaluation(), limits=Limits(),
        device="cpu", prompts=(), seed=0,
    )  # fmt: skip
    run(job, events.append)
    return next((event.verdict.status.value for event in events if isinstance(event, Judged)), "planned")


def _bounded(what: str, work: Callable[[], str]) -> Ended:
    start = time.monotonic()
    replies, ours = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(replies)
        _report(ours, work)
    os.close(ours)
    text, deadline = b"", start + WALL_S
    while (left := deadline - time.monotonic()) > 0 and select.select([replies], [], [], left)[0]:
        part = os.read(replies, 1 << 16)
        if not part:
            break
        text += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(replies)
    _, status, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    wall_s = time.monotonic() - start
    died = ("hang" if wall_s >= WALL_S else "crash", f"code {code}")
    result, detail = json.loads(text) if text and code == 0 else died
    return Ended(what=what, result=result, detail=detail, wall_s=wall_s, rss_bytes=usage.ru_maxrss * 1024)


def _report(pipe: int, work: Callable[[], str]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    try:
        found = (work(), "")
    except RunnerError as error:
        found = (type(error).__name__, str(error))
    except BaseException:  # noqa: BLE001  (whatever it is, it is the finding)
        found = ("crash", traceback.format_exc())
    os.write(pipe, json.dumps(found).encode()[: 1 << 20])
    os._exit(0)


def fuzz(seeds: Sequence[int], root: Path) -> Iterator[Ended]:
    """Yield how each seed's case ended."""
    made = _bounded("models", lambda: str(make_models(root).base))  # in a child: threads of torch do not survive a fork
    if not made.is_sound:
        raise RuntimeError(made.detail)
    models = Models(base=root / "base", adapter=root / "adapter", merged=root / "merged")
    for seed in seeds:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            yield case(seed, models, Path(folder))


def main(arguments: Sequence[str]) -> int:
    count, first = (*map(int, arguments), *(220, 0)[len(arguments) :])[:2]
    counts: Counter[str] = Counter()
    worst_s, worst_bytes, findings = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as root:
        for ended in fuzz(range(first, first + count), Path(root)):
            counts[ended.result] += 1
            worst_s, worst_bytes = max(worst_s, ended.wall_s), max(worst_bytes, ended.rss_bytes)
            if not ended.is_sound:
                findings += 1
                sys.stdout.write(f"{ended.what}: {ended.result} {ended.wall_s:.1f} s\n{ended.detail}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{count} folders: {dict(counts)}; at most {worst_s:.1f} s, {worst_bytes >> 20} MiB\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

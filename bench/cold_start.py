"""How large an image is, and how long a container of it takes to be useful.

    python -m bench.cold_start IMAGE [--runs 5] [--variant cpu] [--drop-caches]

Runs `mode: plan` on a tiny model in a new container, again and again, and reads the clock from `docker run` until the
first line of the log, until the line `Worker:` (torch, transformers and peft are imported, the device is known), and
until the container is gone. Writes tests/records/cold-start.json, from which `python -m tools.tables` makes the table
in docs/image.md. With `--drop-caches` (root) the kernel forgets all files before each run, as after a reboot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.synthetic import ALL_LINEAR, write_adapter, write_base

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests" / "records" / "cold-start.json"
READY = "Worker: "
BASE_BYTES = 20_000_000
LARGE_LAYER_BYTES = 10_000_000


class ColdStartError(Exception):
    """Nothing could be measured; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One container; seconds since `docker run`.

    Attributes:
        first_line_s: until the log's first line.
        ready_s: until the worker has its libraries.
        gone_s: until the plan is told and the container removed.
    """

    first_line_s: float
    ready_s: float
    gone_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of an image: its size, and the step of the Dockerfile that made it."""

    size_bytes: int
    step: str


def read_size(image: str) -> int:
    """Return the bytes of an image, unpacked."""
    return int(_docker("image", "inspect", "--format", "{{.Size}}", image))


def read_layers(image: str) -> tuple[Layer, ...]:
    """Return the layers that hold something worth telling, the lowest first."""
    template = "{{.Size}}\t{{.CreatedBy}}"
    lines = _docker("history", "--no-trunc", "--human=false", "--format", template, image).splitlines()
    found = [line.partition("\t") for line in reversed(lines)]
    layers = [Layer(size_bytes=int(size), step=step_of(command)) for size, _, command in found]
    return tuple(layer for layer in layers if layer.size_bytes >= LARGE_LAYER_BYTES)


def step_of(command: str) -> str:
    """Return which part of the image a build command made."""
    for sign, step in (("requirements.lock", "transformers, peft and what they need"), ("TORCH", "torch")):
        if sign in command and "pip install" in command:
            return step
    return "this action" if "COPY" in command or "compileall" in command else "Python and its system"


def start_once(image: str, workspace: Path) -> Start:
    """Run one plan in a new container.

    Raises:
        ColdStartError: the plan failed, or said nothing of its worker.
    """
    command = ["docker", "run", "--rm", "--network", "none", "-v", f"{workspace}:/github/workspace", image]
    flags = ["--adapter-path", "adapter", "--base-model", "base", "--mode", "plan"]
    started = time.monotonic()
    process = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None  # noqa: S101  (it was asked for)
    seen: dict[str, float] = {}
    log = ""
    for line in process.stdout:
        log += line
        now = time.monotonic() - started
        seen.setdefault("first", now)
        if line.startswith(READY):
            seen.setdefault("ready", now)
    code = process.wait()
    if code or "ready" not in seen:
        raise ColdStartError(f"The plan ended with {code}:\n{log[-2000:]}")
    return Start(first_line_s=seen["first"], ready_s=seen["ready"], gone_s=time.monotonic() - started)


def measure(image: str, *, runs: int, drop_caches: bool = False) -> dict[str, Any]:
    """Return everything about one image, for JSON."""
    with tempfile.TemporaryDirectory(prefix="bench-cold-start-") as folder:
        workspace = Path(folder)
        shape = write_base(workspace / "base", size_bytes=BASE_BYTES)
        write_adapter(workspace / "adapter", base=workspace / "base", shape=shape, r=4, targets=ALL_LINEAR)
        starts = []
        for _ in range(runs):
            if drop_caches:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3\n")
            starts.append(start_once(image, workspace))
    return {
        "size_bytes": read_size(image),
        "layers": [asdict(layer) for layer in read_layers(image)],
        "starts": [asdict(start) for start in starts],
        "drop_caches": drop_caches,
        "cpu": next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "engine": _docker("version", "--format", "{{.Server.Version}}").strip(),
    }


def rows(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the table of one image: what, and how much."""
    parts = {
        layer["step"]: sum(other["size_bytes"] for other in results["layers"] if other["step"] == layer["step"])
        for layer in results["layers"]
    }
    table = [("size, unpacked", f"{results['size_bytes'] / 1e9:.2f} GB")]
    table += [(f"… {step}", f"{size / 1e9:.2f} GB") for step, size in parts.items()]
    for name, what in (
        ("first_line_s", "`docker run` until the first line of the log"),
        ("ready_s", "… until the worker is ready"),
        ("gone_s", "… until a plan is told and the container is gone"),
    ):
        seconds = [start[name] for start in results["starts"]]
        table.append((what, f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"))
    return [*table, ("load of the machine at the end, and its cores", f"{results['load']}, {results['cores']}")]


def _docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ColdStartError(f"docker {arguments[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """Measure an image and write what was found beside what is known of the other variants."""
    parser = argparse.ArgumentParser(prog="python -m bench.cold_start", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--variant", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--drop-caches", action="store_true")
    options = parser.parse_args(arguments)
    try:
        found = measure(options.image, runs=options.runs, drop_caches=options.drop_caches)
    except ColdStartError as error:
        print(f"bench.cold_start: {error}", file=sys.stderr)
        return 1
    known = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**known, options.variant: found}, indent=2) + "\n", "utf-8")
    for what, how_much in rows(found):
        print(f"{what}: {how_much}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Measure the merge beside `cp`, beside copy and sha256, and beside PEFT, on the same files in one run.

    python -m bench.merge --size-gb 2 --rounds 3

Each contestant is a process of its own; anonymous and resident memory are sampled from /proc every 10 ms. The
rounds are interleaved, and the median is printed: file systems of shared machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SAMPLE_EVERY_S = 0.01
ROOT = Path(__file__).resolve().parent.parent

COPY_AND_HASH = """
import hashlib, json, shutil, sys, time
from pathlib import Path
source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir()
started = time.monotonic()
for path in sorted(source.iterdir()):
    with path.open("rb") as read, (target / path.name).open("wb") as write:
        shutil.copyfileobj(read, write, 4 << 20)
for path in sorted(target.iterdir()):
    with path.open("rb") as read:
        hashlib.file_digest(read, "sha256")
print(json.dumps({"after_imports_s": time.monotonic() - started}))
"""
PEFT = """
import json, sys, time
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
started = time.monotonic()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
PeftModel.from_pretrained(model, sys.argv[3]).merge_and_unload().save_pretrained(sys.argv[2])
print(json.dumps({"after_imports_s": time.monotonic() - started}))
"""
OURS = """
import json, sys, time
from pathlib import Path
from runner.merge import merge
from runner.prepare import prepare
started = time.monotonic()
prepared = prepare(Path(sys.argv[1]), Path(sys.argv[3]), dtype="auto")
planned = time.monotonic()
merged = merge(prepared, into=Path(sys.argv[2]))
print(json.dumps({"after_imports_s": time.monotonic() - started, "plan_s": planned - started, "digest": merged.digest}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contestant once; seconds and bytes."""

    wall_s: float
    after_imports_s: float | None
    cpu_s: float
    anonymous_bytes: int
    resident_bytes: int


def measure(command: list[str]) -> Run:
    """Run `command` and return what it took; it may print its time after imports as JSON in its last line."""
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    anonymous = resident = ticks = 0
    while process.poll() is None:
        found = _memory(process.pid)
        anonymous, resident = max(anonymous, found[0]), max(resident, found[1])
        ticks = max(ticks, _cpu_ticks(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    wall_s = time.monotonic() - started
    output, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command[:2]} failed:\n{errors[-2000:]}")
    last = output.strip().splitlines()[-1:] or ["{}"]
    after = json.loads(last[0]).get("after_imports_s")
    return Run(
        wall_s=wall_s, after_imports_s=after, cpu_s=ticks / 100, anonymous_bytes=anonymous, resident_bytes=resident
    )


def contestants(base: Path, adapter: Path, out: Path) -> dict[str, list[str]]:
    """Return name → command that leaves its result in `out`."""
    python = [sys.executable, "-W", "ignore", "-c"]
    return {
        "cp": ["cp", "-r", str(base), str(out)],
        "copy, then sha256": [*python, COPY_AND_HASH, str(base), str(out)],
        "lora-merge-action": [*python, OURS, str(base), str(out), str(adapter)],
        "PEFT": [*python, PEFT, str(base), str(out), str(adapter)],
    }


def main() -> None:
    """Make the model, run the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the bf16 base")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--targets", default="all", help="`all`, or module names with commas between them")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()

    from bench.synthetic import ALL_LINEAR, write_adapter, write_base

    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=arguments.folder) as name:
        folder = Path(name)
        base, adapter = folder / "base", folder / "adapter"
        layers = write_base(base, size_bytes=int(arguments.size_gb * 1e9))
        targets = ALL_LINEAR if arguments.targets == "all" else tuple(arguments.targets.split(","))
        write_adapter(adapter, layers=layers, r=arguments.r, targets=targets)
        size = sum(path.stat().st_size for path in base.iterdir())
        print(f"base: {size / 1e9:.2f} GB bf16, {layers} layers; LoRA r={arguments.r} on {', '.join(targets)}")
        runs: dict[str, list[Run]] = {}
        for turn in range(arguments.rounds):
            out = folder / "out"
            for contestant, command in contestants(base, adapter, out).items():
                runs.setdefault(contestant, []).append(measure(command))
                subprocess.run(["rm", "-rf", str(out)], check=True)
            print(f"round {turn + 1} of {arguments.rounds} done", file=sys.stderr)
        print(table(runs))


def table(runs: dict[str, list[Run]]) -> str:
    """Return medians (and the range of wall time) as a Markdown table."""
    lines = [
        "| contestant | wall s | min-max | after imports s | CPU s | peak anonymous MB | peak resident MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, done in runs.items():
        walls = [run.wall_s for run in done]
        afters = [run.after_imports_s for run in done if run.after_imports_s is not None]
        after = f"{statistics.median(afters):.2f}" if afters else "-"
        lines.append(
            f"| {name} | {statistics.median(walls):.2f} | {min(walls):.2f}-{max(walls):.2f} | {after} "
            f"| {statistics.median(run.cpu_s for run in done):.1f} "
            f"| {max(run.anonymous_bytes for run in done) / 1e6:.0f} "
            f"| {max(run.resident_bytes for run in done) / 1e6:.0f} |"
        )
    return "\n".join(lines)


def _memory(pid: int) -> tuple[int, int]:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "VmRSS")))
    kilobytes = {name: int(value.split()[0]) for name, value in fields.items()}
    return kilobytes.get("RssAnon", 0) << 10, kilobytes.get("VmRSS", 0) << 10


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[11]) + int(fields[12])


if __name__ == "__main__":
    main()

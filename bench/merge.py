"""Measure the merge beside `cp`, beside copy and sha256, beside PEFT and other peers, on the same files in one run.

    python -m bench.merge --size-gb 2 --rounds 3
    python -m bench.merge --full --write docs/benchmarks.md

Each contestant is a process of its own in each round, measured from outside; the rounds are interleaved. Before every
run the inputs are read once, so that files are warm, and what others wrote is on disk. `python -m bench.peers setup`
makes the peers' environments; without them only those that need none take part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.contestants import Contestant, contestants
from bench.machine import describe
from bench.measure import Failure, Limits, Run, measure
from bench.report import tables, write_page

ROOT = Path(__file__).resolve().parent.parent
READ_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One base with one adapter.

    Attributes:
        size_gb: of the bf16 base, in 1e9 bytes.
        targets: modules that the adapter changes; empty for all linear ones.
        rounds: how often copies, ours and PEFT run.
        peer_rounds: how often the other peers run, at most.
        r: rank of the adapter.
        compares: whether the merges are compared with the right one, element by element.
    """

    size_gb: float
    targets: tuple[str, ...] = ()
    rounds: int = 3
    peer_rounds: int = 3
    r: int = 16
    compares: bool = True


# The most telling first, in case the time does not suffice for all.
FULL = (
    Case(size_gb=3, rounds=3, peer_rounds=1),
    Case(size_gb=8, rounds=1, peer_rounds=1, compares=False),
    Case(size_gb=1, rounds=3, peer_rounds=1),
    Case(size_gb=3, rounds=2, peer_rounds=1, targets=("q_proj", "v_proj")),
    Case(size_gb=0.3, rounds=3, peer_rounds=1),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is the same for all cases.

    Attributes:
        chosen: who takes part, in the order of a round.
        limits: beyond which a contestant is stopped.
        until: when to stop beginning new runs, on the monotonic clock.
        compare: whether to compare the merges with the right one.
    """

    chosen: list[Contestant]
    limits: Limits
    until: float = float("inf")
    compare: bool = True


def main() -> None:
    """Run the cases, print the tables, and write what was asked for."""
    arguments = parse()
    if arguments.from_json:
        document = json.loads(arguments.from_json.read_text())
    else:
        document = begin(arguments)
        limits = Limits(wall_s=arguments.timeout, anonymous_bytes=int(available_bytes() * 0.95))
        chosen = [one for one in contestants() if not arguments.only or one.name in arguments.only]
        until = time.monotonic() + 60 * arguments.minutes
        for case in cases(arguments):
            if time.monotonic() > until:
                print(f"no time is left for {case.size_gb:g} GB", file=sys.stderr, flush=True)
                break
            bench = Bench(chosen=chosen, limits=limits, until=until, compare=arguments.compare and case.compares)
            add(document, run_case(case, bench, arguments.folder))
            if arguments.json:
                arguments.json.write_text(json.dumps(document, indent=1))
    print(tables(document))
    if arguments.write:
        write_page(arguments.write, document)


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the document that the cases go into: an empty one, or one of earlier runs on this machine.

    Raises:
        SystemExit: the earlier runs are of another machine, or of other versions.
    """
    document: dict[str, Any] = {"command": command(arguments), "machine": describe(), "cases": []}
    if arguments.add_to is None:
        return document
    earlier: dict[str, Any] = json.loads(arguments.add_to.read_text())
    for name, value in document["machine"].items():
        if name != "commit" and json.dumps(value) != json.dumps(earlier["machine"][name]):
            raise SystemExit(f"{arguments.add_to} is not of this machine: {name} was {earlier['machine'][name]}.")
    commits = dict.fromkeys((*earlier["machine"]["commit"].split(", "), document["machine"]["commit"]))
    commands = dict.fromkeys((*earlier["command"].splitlines(), document["command"]))
    document["machine"]["commit"] = ", ".join(commits)
    return document | {"command": "\n".join(commands), "cases": earlier["cases"]}


def add(document: dict[str, Any], found: dict[str, Any]) -> None:
    """Put a case in its place; it replaces one of the same base and adapter."""

    def key(case: dict[str, Any]) -> tuple[int, int, list[str], int]:
        return (-len(case["targets"]), case["base_bytes"], list(case["targets"]), case["r"])

    others = [case for case in document["cases"] if key(case) != key(found)]
    document["cases"] = sorted([*others, found], key=key)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the bf16 base")
    parser.add_argument("--rounds", type=int, default=0, help="default: 3, and with --full what each size has")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--targets", default="all", help="`all`, or module names with commas between them")
    parser.add_argument("--full", action="store_true", help="0.3, 1, 3 and 8 GB, and 3 GB with q and v only")
    numbers = range(1, len(FULL) + 1)
    parser.add_argument(
        "--case", type=int, action="append", choices=numbers, help="with --full: only this one of its cases"
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a contestant; may be repeated")
    parser.add_argument("--timeout", type=float, default=480.0, help="seconds after which a contestant is stopped")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no new run is begun")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="do not compare the merges")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; default: a temporary folder")
    parser.add_argument("--json", type=Path, default=None, help="write every run to this file, after each case")
    parser.add_argument("--add-to", type=Path, default=None, help="a .json of runs on this machine, to be kept beside")
    parser.add_argument("--from-json", type=Path, default=None, help="run nothing: take the runs of this file")
    parser.add_argument("--write", type=Path, default=None, help="page whose tables are replaced, with .json and .svg")
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Return the cases that the arguments ask for."""
    if arguments.full:
        wanted = {"rounds": arguments.rounds, "peer_rounds": arguments.rounds} if arguments.rounds else {}
        chosen = [FULL[number - 1] for number in arguments.case or range(1, len(FULL) + 1)]
        return [replace(case, r=arguments.r, **wanted) for case in chosen]
    targets = () if arguments.targets == "all" else tuple(arguments.targets.split(","))
    rounds = arguments.rounds or 3
    return [Case(size_gb=arguments.size_gb, targets=targets, rounds=rounds, peer_rounds=rounds, r=arguments.r)]


def run_case(case: Case, bench: Bench, parent: Path | None) -> dict[str, Any]:
    """Make base and adapter, run every contestant in every round, and return all that was found, for JSON."""
    from bench.reference import write_reference
    from bench.synthetic import ALL_LINEAR, write_adapter, write_base

    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=parent) as name:
        folder = Path(name)
        base, adapter, reference = folder / "base", folder / "adapter", folder / "reference"
        shape = write_base(base, size_bytes=int(case.size_gb * 1e9))
        write_adapter(adapter, base=base, shape=shape, r=case.r, targets=case.targets or ALL_LINEAR)
        shards = sorted(base.glob("*.safetensors"))
        found: dict[str, Any] = asdict(case) | asdict(shape)
        found |= {"targets": case.targets or ALL_LINEAR, "shards": len(shards)}
        found["base_bytes"] = sum(path.stat().st_size for path in shards)
        print(f"base: {found['base_bytes'] / 1e9:.2f} GB bf16, {shape.layers} layers", file=sys.stderr, flush=True)
        if bench.compare:
            write_reference(base, adapter, reference)
        found["results"] = run_rounds(case, bench, folder)
    return found


def run_rounds(case: Case, bench: Bench, folder: Path) -> dict[str, dict[str, Any]]:
    """Return contestant → its runs, or why it failed (it is not tried again), and how far its merge is off."""
    results: dict[str, dict[str, Any]] = {one.name: {"runs": []} for one in bench.chosen}
    for turn in range(max(case.rounds, case.peer_rounds)):
        for one in bench.chosen:
            result = results[one.name]
            if "failure" in result or turn >= (case.rounds if one.every_round else case.peer_rounds):
                continue
            if time.monotonic() > bench.until:
                if not result["runs"]:
                    result["failure"] = "did not run: the time for the whole benchmark was up"
                continue
            found = run_once(one, result, bench, folder)
            took = f"{found.wall_s:.1f} s" if isinstance(found, Run) else found.why
            print(f"round {turn + 1} of {case.rounds}: {one.name}: {took}", file=sys.stderr, flush=True)
    return results


def run_once(one: Contestant, result: dict[str, Any], bench: Bench, folder: Path) -> Run | Failure:
    """Run a contestant in a fresh folder of its own, and note in `result` what came of it."""
    from bench.reference import compare

    base, adapter, scratch = folder / "base", folder / "adapter", folder / "scratch"
    out = scratch / "out"
    scratch.mkdir()
    warm(base, adapter)
    command_line, environment = one.arguments(base, out, adapter), one.environment(scratch)
    found = measure(command_line, folder=scratch, limits=bench.limits, environment=environment)
    if isinstance(found, Run) and bench.compare and one.merges and "difference" not in result:
        result["difference"] = asdict(compare(base, folder / "reference", out))
    note(result, found)
    shutil.rmtree(scratch)
    return found


def note(result: dict[str, Any], found: Run | Failure) -> None:
    """Add a run to a contestant's result; a failure replaces its times, so that it can never pass for one."""
    if isinstance(found, Run):
        result["runs"].append(asdict(found))
    else:
        result |= {"failure": found.why, "output": found.output, "runs": []}
        print(found.output, file=sys.stderr, flush=True)


def warm(*folders: Path) -> None:
    """Read every file into the page cache, after what is still to be written is on disk."""
    os.sync()
    buffer = bytearray(READ_BYTES)
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def available_bytes() -> int:
    """Return how much memory a program can get without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise SystemExit("/proc/meminfo has no MemAvailable: a Linux kernel is needed.")


def command(arguments: argparse.Namespace) -> str:
    """Return the command line that this is, as one would type it in the repository, less where it works and writes."""
    if arguments.full:
        what = ["--full"] + [word for number in arguments.case or () for word in ("--case", str(number))]
        what += ["--rounds", str(arguments.rounds)] if arguments.rounds else []
    else:
        what = ["--size-gb", f"{arguments.size_gb:g}", "--rounds", str(arguments.rounds or 3)]
        what += ["--targets", arguments.targets] if arguments.targets != "all" else []
    what += ["--minutes", f"{arguments.minutes:g}"] if arguments.minutes != float("inf") else []
    what += ["--r", str(arguments.r)] if arguments.r != 16 else []
    only = [word for name in arguments.only for word in ("--only", shlex.quote(name))]
    kept = ["--add-to", "tests/records/benchmarks.json"] if arguments.add_to else []
    return " ".join(["python -m bench.merge", *what, *only, *kept, "--write docs/benchmarks.md"])


if __name__ == "__main__":
    main()

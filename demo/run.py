"""`make demo`: from a real base and a real adapter to a verified tag, then the released model answers.

Everything runs as a user would run it: the Hub is a process on a loopback socket, the main job is the command line
of `entrypoint.py`, and the released model is loaded by plain transformers in a process that cannot import PEFT.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo import DemoError, smollm2

ROOT = Path(__file__).resolve().parents[1]
USER = "demo"
BASE_REPO = f"{USER}/SmolLM2-135M-Instruct"
TARGET_REPO = f"{USER}/smollm2-pirate"
TAG = "v1.0.0"
ADAPTER = ROOT / "demo/adapter"
PROMPT = "What is the capital of France?"
HUB_START_S = 60
HUB_STOP_S = 10
FOREIGN = ("GITHUB_", "INPUT_", "RUNNER_", "ACTIONS_", "HF_", "HUGGING")


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """What the main job says it released.

    Attributes:
        commit: 40 hex digits.
        verified: whether the judge passed it.
        report: the Markdown report.
    """

    commit: str
    verified: bool
    report: Path


def demo(folder: Path, *, adapter: Path, prompt: str) -> Released:
    """Run the whole demo; what it made stays in `folder` until the next run.

    Args:
        folder: for the base, the Hub's files, the client's cache and the report.
        adapter: folder of the adapter.
        prompt: what base and released model are asked.

    Raises:
        DemoError: a step failed, or the released model is not what the report says.
    """
    say("base", "SmolLM2-135M-Instruct, bf16, 3 shards (built on the first run, reused later)")
    base = smollm2.build(folder / "smollm2", cache=folder / "cache")
    for stale in ("hub", "home", "report", "work"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    with local_hub(folder / "hub") as hub:
        environment = client_environment(os.environ, hub=hub, home=folder / "home")
        say("hub", f"serving on {hub['endpoint']}, files in {shown(folder / 'hub')}")
        base_commit = python(["-m", "demo.push", str(base), BASE_REPO], environment, step="pushing the base").strip()
        say("hub", f"{BASE_REPO} is there at {base_commit}")
        released = main_job(adapter, folder, environment)
        answers = json.loads(
            python(
                ["-m", "demo.ask", prompt, f"{BASE_REPO}@{base_commit}", f"{TARGET_REPO}@{TAG}"],
                environment,
                step="loading the released model without PEFT",
            )
        )
    check(released, answers, must_differ=(adapter, prompt) == (ADAPTER, PROMPT))
    say("ask", f"loaded {TARGET_REPO} at {TAG} with transformers, in a process that cannot import PEFT")
    print(f"\n  prompt    {prompt}\n  base      {answers[0]['answer']}\n  released  {answers[1]['answer']}\n")
    say("done", f"report {shown(released.report)} and {shown(released.report.with_suffix('.json'))}")
    say("done", f"the Hub's files {shown(folder / 'hub')}")
    return released


def main_job(adapter: Path, folder: Path, environment: Mapping[str, str]) -> Released:
    """Run `entrypoint.py` with its log on our output; returns what its report says.

    Raises:
        DemoError: it failed, or wrote no report.
    """
    report = folder / "report"
    options = {
        "--adapter-path": shown(adapter),
        "--base-model": BASE_REPO,
        "--target-repo": TARGET_REPO,
        "--tag": TAG,
        "--report-dir": shown(report),
        "--work-dir": shown(folder / "work"),
    }
    command = ["entrypoint.py", *(word for pair in options.items() for word in pair)]
    say("run", f"python {shlex.join(command)}")
    started = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=dict(environment), check=False).returncode
    if code != 0:
        where = f", its report in {shown(report)}" if report.is_dir() else ""
        raise DemoError(f"the main job ended with exit code {code}; its log is above{where}")
    say("run", f"the main job took {time.monotonic() - started:.1f} s")
    try:
        outputs = json.loads((report / "report.json").read_bytes())["outputs"]
        return Released(
            commit=outputs["commit-sha"], verified=outputs["verified"] == "true", report=report / "report.md"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DemoError(f"the main job left no usable report in {shown(report)}: {error!r}") from error


def check(released: Released, answers: Sequence[Mapping[str, str]], *, must_differ: bool) -> None:
    """Compare what the report says with what a user gets.

    Args:
        released: from the report.
        answers: of the base and of the released model.
        must_differ: whether the adapter is known to change the answer.

    Raises:
        DemoError: another commit, no passed verdict, or an answer that the adapter did not change.
    """
    base, merged = answers
    if merged["commit"] != released.commit:
        raise DemoError(f"the report says commit {released.commit}, but {TAG} loads {merged['commit']}")
    if not released.verified:
        raise DemoError("the release is not verified")
    if must_differ and merged["answer"] == base["answer"]:
        raise DemoError(f"the released model answers like the base: {base['answer']!r}")


@contextlib.contextmanager
def local_hub(root: Path) -> Iterator[Mapping[str, str]]:
    """Serve a fresh Hub in `root` for as long as the context is open; gives its `endpoint` and `token`.

    Raises:
        DemoError: it did not start.
    """
    root.mkdir(parents=True)
    log = root.with_suffix(".log")
    command = [sys.executable, "-m", "tests.hub", "--root", str(root), "--port", "0", "--user", USER]
    with log.open("wb") as errors:
        hub = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
    try:
        try:
            address = json.loads(_first_line(hub, timeout_s=HUB_START_S))
        except ValueError as error:
            raise DemoError(f"the local Hub did not start, see {shown(log)}") from error
        yield address
    finally:
        _stop(hub)


def _first_line(hub: subprocess.Popen[bytes], *, timeout_s: float) -> bytes:
    """Return the first line of the Hub's output, or b"" where none came in time."""
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        lines.put(hub.stdout.readline() if hub.stdout else b"")

    threading.Thread(target=read, daemon=True).start()
    try:
        return lines.get(timeout=timeout_s)
    except queue.Empty:
        return b""


def _stop(hub: subprocess.Popen[bytes]) -> None:
    """End the Hub: it leaves when its input closes, and is killed where it does not."""
    if hub.stdin:
        hub.stdin.close()
    try:
        hub.wait(timeout=HUB_STOP_S)
    except subprocess.TimeoutExpired:
        hub.kill()
        hub.wait()


def client_environment(ours: Mapping[str, str], *, hub: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a user whose Hub is the local one.

    What a workflow or the user's own Hub account set is left out, so that the demo can neither write a workflow's
    outputs nor reach a real account; the loopback address never goes through a proxy.
    """
    kept = {name: value for name, value in ours.items() if not name.startswith(FOREIGN)}
    direct = ",".join(filter(None, (kept.get("no_proxy") or kept.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return kept | {
        "HF_ENDPOINT": hub["endpoint"],
        "HF_TOKEN": hub["token"],
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "no_proxy": direct,
        "NO_PROXY": direct,
    }


def python(arguments: Sequence[str], environment: Mapping[str, str], *, step: str) -> str:
    """Run this interpreter with `arguments`; returns its output.

    Raises:
        DemoError: it failed; the text has the last line that it wrote.
    """
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.stderr.write(done.stderr)
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DemoError(f"{step}: {lines[-1]}")
    return done.stdout


def shown(path: Path) -> str:
    """Return the path as a user in the repository's folder would write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say(room: str, text: str) -> None:
    """Print one line of the demo's own log."""
    print(f"[{room}] {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".demo", help="for everything that the demo makes")
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="folder of the adapter")
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args(arguments)
    try:
        released = demo(options.folder.resolve(), adapter=options.adapter.resolve(), prompt=options.prompt)
    except DemoError as error:
        print(f"demo: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: failed: interrupted", file=sys.stderr)
        return 130
    print(f"demo: ok tag={TAG} commit={released.commit} verified=true")
    return 0


if __name__ == "__main__":
    sys.exit(main())

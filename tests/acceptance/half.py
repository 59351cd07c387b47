"""The publishing half of the action as processes: forked from one that has its libraries imported, killed at will.

    python -m tests.acceptance.half

reads jobs, one JSON object a line, and answers each with a line: the exit codes of its children. A child does what the
supervisor does after the verdict (look at the target, look for the release, publish a folder), with the product's own
rooms and the unmodified client. What it does not have is the merge before it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.warmth import ROOT


@dataclass(frozen=True)
class Half:
    """The process that forks publishers."""

    process: subprocess.Popen[str]

    def publish(self, *jobs: Mapping[str, Any], kill_after_s: float | None = None) -> list[int]:
        """Publish with one process for each job, all at once, and return their exit codes.

        Args:
            jobs: each with endpoint, token, repo_id, tag, folder, adapter (a digest), xet, home and result (a path);
                and `is_staged`, if it is to go by way of a staging branch.
            kill_after_s: send SIGKILL to all of them after so long.
        """
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"jobs": jobs, "kill_after_s": kill_after_s}) + "\n")
        stdin.flush()
        codes: list[int] = json.loads(stdout.readline())
        return codes


@contextmanager
def halves() -> Iterator[Half]:
    """Yield a process that publishes in children; it ends with the block."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("HF_", "INPUT_", "GITHUB_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.half"], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env=kept | {"HF_XET_CLIENT_RETRY_BASE_DELAY": "20ms"},
    )  # fmt: skip
    try:
        yield Half(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.wait()
        process.stdout.close()


def main() -> None:
    """Fork, wait, answer, until there are no more lines."""
    import hf_xet  # noqa: F401
    import httpx2  # noqa: F401
    import huggingface_hub
    from huggingface_hub import hf_api  # noqa: F401

    import tests.supervisor.publish.world  # noqa: F401

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True
    for line in sys.stdin:
        wanted = json.loads(line)
        children = [_fork(job) for job in wanted["jobs"]]
        if wanted["kill_after_s"] is not None:
            time.sleep(wanted["kill_after_s"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()


def _fork(job: Mapping[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(2, 1)  # what is printed must not be taken for an answer
        code = _publish(job)
    except BaseException:  # noqa: BLE001  (a forked child must never run on into the parent's code)
        Path(job["result"]).write_text(json.dumps({"error": traceback.format_exc()}))
    finally:
        os._exit(code)


def _publish(job: Mapping[str, Any]) -> int:
    from huggingface_hub import constants

    from runner.protocol.errors import RunnerError
    from runner.supervisor.hub import Patience
    from tests.supervisor.publish.world import World, origin

    os.environ |= {"HF_HOME": job["home"], "HF_XET_CACHE": f"{job['home']}/xet"}
    constants.HF_HUB_CACHE = f"{job['home']}/hub"
    constants.HF_HUB_DISABLE_XET = not job["xet"]
    world = World(
        hub=_Address(job["endpoint"]),  # type: ignore[arg-type]  # a publisher needs no more of a Hub
        token=job["token"],
        folder=Path(job["folder"]),
        patience=Patience(attempts=5, deadline_s=20.0, first_wait_s=0.02, longest_wait_s=0.2),
        origin=origin(job["adapter"]),
    )
    try:
        release = world.publish(repo_id=job["repo_id"], tag=job["tag"], is_staged=job.get("is_staged", False))
    except RunnerError as error:
        told = {"family": type(error).__name__, "what": error.problem.what, "why": error.problem.why}
        Path(job["result"]).write_text(json.dumps(told))
        return error.exit_code
    Path(job["result"]).write_text(json.dumps({"commit": release.commit, "created": release.created}))
    return 0


@dataclass(frozen=True)
class _Address:
    endpoint: str


if __name__ == "__main__":
    main()

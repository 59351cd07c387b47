"""A Docker engine of the tests' own, whose PATH holds a stand-in of the NVIDIA toolkit's prestart hook.

The engine then accepts requests for GPUs, and gives them to the container as the toolkit wants them; the stand-in
keeps the container's whole OCI configuration instead of putting a driver into it. All of the engine is real.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BRIDGE_ADDRESS = "198.18.77.1/24"  # from the range for tests of networks; no container uses it
HOOK = """#!/bin/sh
bundle=$(sed -n 's/.*"bundle":"\\([^"]*\\)".*/\\1/p')
cp "$bundle/config.json" "{records}/$(basename "$bundle").json"
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondEngine:
    """A running engine."""

    host: str
    records: Path

    def configurations(self) -> list[dict[str, Any]]:
        """Return the OCI configuration of every container that asked for a GPU, the oldest first."""
        files = sorted(self.records.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [json.loads(path.read_text()) for path in files]

    def forget(self) -> None:
        for path in self.records.glob("*.json"):
            path.unlink()


@contextmanager
def second_engine(root: Path) -> Iterator[SecondEngine]:
    """Start an engine whose files are all below `root`, and stop it by its pid."""
    tools, records = root / "tools", root / "records"
    for folder in (tools, records):
        folder.mkdir(parents=True)
    hook = tools / "nvidia-container-runtime-hook"
    hook.write_text(HOOK.format(records=records))
    hook.chmod(0o755)
    host = f"unix://{root}/docker.sock"
    # A bridge of its own: an engine without one (`--bridge none`) takes `docker0` away from the engine that has it.
    bridge = f"lmt{os.getpid()}"[:15]
    subprocess.run(["ip", "link", "add", "name", bridge, "type", "bridge"], check=True)
    subprocess.run(["ip", "address", "add", BRIDGE_ADDRESS, "dev", bridge], check=True)
    log = (root / "dockerd.log").open("wb")
    process = subprocess.Popen(
        ["dockerd", "--data-root", str(root / "data"), "--exec-root", str(root / "exec"), "--host", host,
         "--pidfile", str(root / "pid"), "--bridge", bridge, "--iptables=false", "--ip-masq=false"],
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, stdout=log, stderr=log, start_new_session=True,
    )  # fmt: skip
    try:
        _wait_for(host, process)
        yield SecondEngine(host=host, records=records)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()
        subprocess.run(["ip", "link", "delete", bridge], check=False)
        subprocess.run(["umount", "--lazy", str(root / "exec/netns/default")], capture_output=True, check=False)
        for name in ("data", "exec"):  # more than a gigabyte, which pytest would keep
            shutil.rmtree(root / name, ignore_errors=True)


def load_image(image: str, source: str, target: str) -> None:
    """Copy an image from one engine to another."""
    save = subprocess.Popen(["docker", "--host", source, "save", image], stdout=subprocess.PIPE)
    subprocess.run(["docker", "--host", target, "load"], stdin=save.stdout, capture_output=True, check=True)
    assert save.wait() == 0


def _wait_for(host: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while subprocess.run(["docker", "--host", host, "version"], capture_output=True, check=False).returncode:
        assert process.poll() is None, "the second engine has ended"
        assert time.monotonic() < deadline, "the second engine does not answer"
        time.sleep(0.2)

"""What the figures were taken on: processor, memory, kernel, and the versions of what took part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from bench.peers import PEERS, ROOT

SHOWN = ("torch", "transformers", "peft", "safetensors", "numpy")


def describe() -> dict[str, object]:
    """Return it, for JSON; nothing in it names the machine or a path on it."""
    return {
        "cpu": _field("/proc/cpuinfo", "model name"),
        "cores": os.cpu_count(),
        "memory_gb": round(int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024 / 1e9, 1),
        "kernel": platform.release(),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in SHOWN},
        "peers": {peer.name: _shown(peer.pins) for peer in PEERS if peer.is_ready},
    }


def _commit() -> str:
    """Return the commit of this tree, or `unknown` where there is no git."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _shown(pins: dict[str, str]) -> dict[str, str]:
    """Return the versions that the pages show: the peer's own and those of what it merges with."""
    own = ("mergekit", "axolotl", "llamafactory", "ms-swift", "ms_swift", "unsloth", "unsloth_zoo")
    return {name: version for name, version in pins.items() if name in (*own, *SHOWN)}


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown 0"

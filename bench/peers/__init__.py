"""The peers that we are measured beside: each in an environment of its own, with every version pinned.

`python -m bench.peers setup` makes the environments below .bench/envs, which git ignores. torch is installed first and
is the same for all; what else a peer has is in NAME.txt, the frozen list of an environment that worked.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ENVIRONMENTS = ROOT / ".bench" / "envs"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
PLOT = "plot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another program that merges.

    Attributes:
        name: as its users call it.
        environment: folder below .bench/envs, and NAME.txt beside this file.
        program: its file in bench/entries.
        runs: what is called, in the words of its users.
        cannot: why it cannot run on a CPU, or empty.
    """

    name: str
    environment: str
    program: str
    runs: str
    cannot: str = ""

    @property
    def python(self) -> Path:
        """The interpreter of its environment."""
        return python_of(self.environment)

    @property
    def is_ready(self) -> bool:
        """Whether it can run here."""
        return not self.cannot and self.python.exists() and (HERE / f"{self.environment}.txt").exists()

    @property
    def pins(self) -> dict[str, str]:
        """Package → version, of everything but torch."""
        lines = (HERE / f"{self.environment}.txt").read_text().splitlines()
        pairs = (line.split("==") for line in lines if "==" in line)
        return {name.strip(): version.strip() for name, version in pairs}


PEERS = (
    Peer(
        name="mergekit",
        environment="mergekit",
        program="mergekit_merge.py",
        runs="`mergekit-yaml --lazy-unpickle` on `base+adapter`",
    ),
    Peer(
        name="axolotl",
        environment="axolotl",
        program="axolotl_merge.py",
        runs="`axolotl merge-lora`, method `memory_efficient` (its default)",
    ),
    Peer(
        name="LLaMA-Factory",
        environment="llamafactory",
        program="llamafactory_merge.py",
        runs="`llamafactory-cli export`, `export_device: cpu`",
    ),
    Peer(
        name="ms-swift",
        environment="ms-swift",
        program="ms_swift_merge.py",
        runs="`swift export --merge_lora true`",
    ),
    Peer(
        name="unsloth",
        environment="unsloth",
        program="unsloth_merge.py",
        runs="`save_pretrained_merged(save_method='merged_16bit')`",
    ),
)


def python_of(environment: str) -> Path:
    """Return the interpreter of an environment, which need not exist."""
    return ENVIRONMENTS / environment / "bin" / "python"


def set_up(environment: str) -> None:
    """Make an environment from NAME.txt: torch first, then exactly the listed versions and nothing that they ask for.

    Raises:
        subprocess.CalledProcessError: pip or venv failed; its own output says why.
    """
    folder = ENVIRONMENTS / environment
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    if environment != PLOT:
        subprocess.run([*pip, *TORCH.split()], check=True)
    subprocess.run([*pip, "--no-deps", "-r", str(HERE / f"{environment}.txt")], check=True)

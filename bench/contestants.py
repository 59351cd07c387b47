"""Who takes part: a name, a program, and the Python that runs it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.peers import PEERS, Peer

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = Path(__file__).resolve().parent / "entries"
OURS = "lora-merge-action"
PEFT = "PEFT"
COPY_AND_HASH = "copy, then sha256"
# A contestant runs as on a machine of its own user's: no settings of ours, no Hub, no telemetry, no GPU.
DROPPED = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH", "VIRTUAL_ENV")
SET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_DISABLED": "true",
    "UNSLOTH_DISABLE_STATISTICS": "1", "GRADIO_ANALYTICS_ENABLED": "False", "CUDA_VISIBLE_DEVICES": "",
    "PYTHONWARNINGS": "ignore", "MODELSCOPE_OFFLINE": "1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """One who takes part.

    Attributes:
        name: as the tables have it.
        command: the program; base, out and adapter are appended.
        merges: whether its output is a merge (a copy is not), to be compared with the right one.
        every_round: whether it runs in each round, or in the first ones only (`peer_rounds` of the case).
        python_path: for PYTHONPATH, or empty.
    """

    name: str
    command: tuple[str, ...]
    merges: bool = True
    every_round: bool = True
    python_path: str = ""

    def arguments(self, base: Path, out: Path, adapter: Path) -> list[str]:
        """Return the whole command."""
        files = [str(base), str(out)] if not self.merges else [str(base), str(out), str(adapter)]
        return [*self.command, *files]

    def environment(self, scratch: Path) -> dict[str, str]:
        """Return the environment that it runs in; what it keeps for itself goes below `scratch`."""
        kept = {name: value for name, value in os.environ.items() if name not in DROPPED}
        caches = {"HF_HOME": scratch / "hf", "MODELSCOPE_CACHE": scratch / "modelscope", "TMPDIR": scratch}
        path = {"PYTHONPATH": self.python_path} if self.python_path else {}
        return kept | SET | path | {name: str(folder) for name, folder in caches.items()}


def entry(program: str, python: Path | None = None) -> tuple[str, ...]:
    """Return the command of a program in bench/entries; `-P` keeps that folder out of its imports."""
    return (str(python or sys.executable), "-P", str(ENTRIES / program))


def contestants() -> list[Contestant]:
    """Return those who can take part here, in the order of a round."""
    fixed = [
        Contestant(name="cp", command=("cp", "-r"), merges=False),
        Contestant(
            name="cp, then sha256sum",
            command=("sh", str(ENTRIES / "cp_and_sha256sum.sh")),
            merges=False,
            every_round=False,
        ),
        Contestant(name=COPY_AND_HASH, command=entry("copy_and_hash.py"), merges=False),
        Contestant(name=OURS, command=entry("ours.py"), python_path=str(ROOT)),
        Contestant(name=PEFT, command=entry("peft_merge.py")),
    ]
    return [*fixed, *(_peer(peer) for peer in PEERS if peer.is_ready)]


def _peer(peer: Peer) -> Contestant:
    return Contestant(name=peer.name, command=entry(peer.program, peer.python), every_round=False)

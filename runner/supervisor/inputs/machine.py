"""What the user asks of the machine: where the worker runs, on which GPU, and how long anything may take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

from runner.supervisor.inputs.form import Form
from runner.supervisor.inputs.gpus import Gpus, parse_gpus, parse_size

MINUTE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The inputs about the machine.

    Attributes:
        executor: auto, inline or docker.
        gpus: which GPUs the worker may use.
        min_free_vram_bytes: of a GPU, before it is used; 0 for any.
        gpu_wait_s: how long to wait for that, and for other runs.
        phase_timeout_s: how long one phase may take; None for as long as it takes.
    """

    executor: Literal["auto", "inline", "docker"]
    gpus: Gpus
    min_free_vram_bytes: int
    gpu_wait_s: float
    phase_timeout_s: float | None

    def public(self) -> dict[str, str]:
        """Return the inputs by name, as `runner.supervisor.inputs.read.Inputs.public` does."""
        limit = self.phase_timeout_s
        return {
            "executor": self.executor,
            "gpus": self.gpus.display,
            "min-free-vram": f"{self.min_free_vram_bytes}B" if self.min_free_vram_bytes else "",
            "gpu-wait-timeout": f"{self.gpu_wait_s / MINUTE_S:g}",
            "phase-timeout-minutes": f"{(limit or 0) / MINUTE_S:g}",
        }


def read_machine(form: Form) -> Machine:
    """Return the inputs about the machine; every problem is noted in the form."""
    wait_s, limit_s = _minutes(form, "gpu-wait-timeout"), _minutes(form, "phase-timeout-minutes")
    machine = Machine(
        executor=cast(Literal["auto", "inline", "docker"], form.choice("executor")),
        gpus=_gpus(form),
        min_free_vram_bytes=_size(form, "min-free-vram"),
        gpu_wait_s=wait_s or 0.0,
        phase_timeout_s=limit_s or None,
    )
    if machine.gpus.is_none and form.values.get("device") == "cuda":
        form.add(
            "`device` is cuda, but `gpus` is none.",
            why="There would be nothing to compute on.",
            fix="Remove `gpus`, or set `device: cpu`.",
        )
    return machine


def _gpus(form: Form) -> Gpus:
    text = form.values.get("gpus") or "all"
    gpus = parse_gpus(text)
    if gpus is None:
        form.add(
            f"`gpus` is {text!r}.",
            why="It is `all`, `none`, how many (`2`), or which: `device=0`, `0,2`, or UUIDs as `nvidia-smi -L` shows.",
            fix="Correct `gpus`; one index alone is written `device=0`.",
        )
    return gpus or Gpus()


def _size(form: Form, name: str) -> int:
    text = form.values.get(name)
    size = parse_size(text) if text else 0
    if size is None:
        form.add(
            f"`{name}` is {text!r}.",
            why="It is a number with a unit: `20GB` is 20 * 10^9 bytes, `20GiB` is 20 * 2^30.",
            fix=f"Write `{name}` so.",
        )
    return size or 0


def _minutes(form: Form, name: str) -> float | None:
    """Return seconds, or None where nothing was given."""
    text = form.values.get(name)
    if not text:
        return None
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 <= minutes < 1e6:
        form.add(f"`{name}` is {text!r}.", why="It is a number of minutes.", fix="Write a number, such as `30`.")
        return None
    return minutes * MINUTE_S

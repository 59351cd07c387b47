"""Which GPUs the worker may use, as the user writes it, and sizes of memory as text. No device is asked here."""

from __future__ import annotations

import re
from dataclasses import dataclass

_DEVICE = re.compile(r"\d+(:\d+)?|(GPU|MIG)-[A-Za-z0-9/-]+")  # 0, 0:1 (a MIG slice), a UUID
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)", re.IGNORECASE)
_UNITS = {"b": 1, **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpus:
    """A choice of GPUs.

    Attributes:
        count: how many, any of them; None for all, or where `devices` says which.
        devices: indices and UUIDs; () where any will do.
    """

    count: int | None = None
    devices: tuple[str, ...] = ()

    @property
    def is_none(self) -> bool:
        """Whether no GPU may be used."""
        return self.count == 0

    @property
    def display(self) -> str:
        """The choice as the user would write it."""
        if self.devices:
            return f"device={','.join(self.devices)}"
        return "all" if self.count is None else str(self.count or "none")

    @property
    def visible_devices(self) -> str | None:
        """Value of CUDA_VISIBLE_DEVICES that leaves only these visible; None to leave it as it is."""
        if self.devices:
            return ",".join(self.devices)
        return None if self.count is None else ",".join(str(index) for index in range(self.count))


def parse_gpus(text: str) -> Gpus | None:
    """Return the choice, or None where `text` is none: `all`, `none`, a number, or a list as in `device=0,2`.

    As for `docker run --gpus`, a number alone is how many; one index is written `device=0`.
    """
    if text == "all":
        return Gpus()
    if text == "none":
        return Gpus(count=0)
    if text.isascii() and text.isdigit():
        return Gpus(count=int(text)) if int(text) else None
    devices = tuple(part.strip() for part in text.removeprefix("device=").split(","))
    if not all(_DEVICE.fullmatch(device) for device in devices) or len(set(devices)) < len(devices):
        return None
    return Gpus(devices=devices)


def parse_size(text: str) -> int | None:
    """Return the bytes that `text` names, such as `20GB` (decimal) or `20GiB` (binary); None where it is no size."""
    found = _SIZE.fullmatch(text)
    return int(float(found[1]) * _UNITS[found[2].lower()]) if found else None

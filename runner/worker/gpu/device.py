"""The GPU as the worker sees it: facts for the diagnosis, and one GPU taken for this run."""

from __future__ import annotations

import ctypes
import re
import warnings
from pathlib import Path

import torch

from runner.protocol.errors import LaunchError
from runner.worker.gpu.diagnosis import Gpu, GpuFacts

_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def look() -> GpuFacts:
    """Return what torch and the driver say; no memory of a GPU is used."""
    driver = _load_driver()
    error = ""
    gpus: tuple[Gpu, ...] = ()
    if torch.version.cuda is not None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count())) if _is_available() else ()
            except RuntimeError as refusal:
                error = str(refusal)
        error = error or " ".join(str(warning.message) for warning in told)
    return GpuFacts(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if torch.version.cuda else (),
        has_driver=driver is not None,
        driver=_driver_version(),
        driver_cuda=_driver_cuda(driver) if driver is not None else None,
        gpus=gpus,
        error=" ".join(error.split())[:300],
    )


def use(uuid: str) -> str:
    """Make the GPU `uuid` the one that `cuda` means, compute a little on it, and return its name.

    Args:
        uuid: as in `look`; "" for the first.

    Raises:
        LaunchError: it does not compute.
    """
    index = next((i for i in range(torch.cuda.device_count()) if _gpu(i).uuid == uuid), 0)
    name = torch.cuda.get_device_name(index)
    try:
        torch.cuda.set_device(index)
        ones = torch.ones(8, 8, device="cuda")
        is_right = bool((ones @ ones).sum().item() == 8.0 * 8 * 8)
    except RuntimeError as error:
        raise LaunchError(
            f"{name} does not compute: {' '.join(str(error).split())[:200]}",
            why="torch sees the GPU, but the first product of two small matrices on it failed.",
            fix="Run `nvidia-smi` on the host: a fault of the device (Xid) is in `dmesg`. An image with another torch "
            "may help; `device: cpu` always does.",
        ) from error
    if not is_right:
        raise LaunchError(
            f"{name} computes wrongly.",
            why="The sum of a product of two matrices of ones is not what it must be.",
            fix="Do not use this GPU; `device: cpu` does without.",
        )
    return name


def _is_available() -> bool:
    return torch.cuda.is_available()


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    uuid = str(getattr(properties, "uuid", ""))
    return Gpu(
        uuid=uuid if uuid.startswith(("GPU-", "MIG-")) or not uuid else f"GPU-{uuid}",
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=properties.total_memory,
    )


def _load_driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _driver_cuda(driver: ctypes.CDLL) -> tuple[int, int] | None:
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _driver_version() -> str | None:
    try:
        found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return found[1] if found else None

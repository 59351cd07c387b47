"""Why torch cannot compute on the GPU, from facts that were collected: what, why, and the exact fix. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from runner.protocol.errors import Problem

# CUDA's major version → the oldest driver that runs programs built with it (NVIDIA's minor version compatibility).
OLDEST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU that torch sees.

    Attributes:
        uuid: as the driver writes it, `GPU-…`; "" where it is not known.
        name: of the product.
        capability: compute capability, such as (9, 0).
        total_bytes: of its memory.
    """

    uuid: str
    name: str
    capability: tuple[int, int]
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What torch and the driver say.

    Attributes:
        torch: version.
        torch_cuda: version of CUDA that torch was built with; None for a build without.
        architectures: what torch has kernels for, such as "sm_90" or "compute_90".
        has_driver: whether the driver's library can be loaded.
        driver: version of the driver, such as "550.54.15"; None where it is not known.
        driver_cuda: newest version of CUDA that the driver runs, such as (12, 4); None where it is not known.
        gpus: what torch can see; () where it refuses.
        error: torch's own words, where it said something.
    """

    torch: str
    torch_cuda: str | None
    architectures: tuple[str, ...]
    has_driver: bool
    driver: str | None
    driver_cuda: tuple[int, int] | None
    gpus: tuple[Gpu, ...]
    error: str


def diagnose(facts: GpuFacts) -> Problem | None:
    """Return what keeps torch from the GPU, or None where nothing is known to."""
    if facts.torch_cuda is None:
        return Problem(
            what="the torch in this image is built without CUDA",
            why=f"torch {facts.torch} is the CPU build.",
            fix='Build the image with a CUDA build of torch: `docker build --build-arg TORCH="torch==…" .`',
        )
    if not facts.has_driver:
        return Problem(
            what="no NVIDIA driver is visible in the container",
            why="libcuda.so.1 cannot be loaded: the NVIDIA container toolkit puts it into a container that was started "
            "with a GPU, and this one was not.",
            fix="On the host run `sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart "
            "docker`, and check with `docker run --rm --gpus all <image> nvidia-smi`.",
        )
    if not facts.gpus and _is_too_old(facts):
        return _too_old(facts)
    if not facts.gpus:
        return Problem(
            what=f"torch {facts.torch} (CUDA {facts.torch_cuda}) sees no usable GPU",
            why=f"The driver {facts.driver or 'is there, and'} shows none. {facts.error}".strip(),
            fix="Run `nvidia-smi` in the container. If it says `Failed to initialize NVML: Unknown Error`, a reload of "
            "systemd took the devices away: start the container anew, and use CDI. Check `gpus` and "
            "CUDA_VISIBLE_DEVICES, too.",
        )
    if not any(has_kernels(gpu.capability, facts.architectures) for gpu in facts.gpus):
        return _without_kernels(facts)
    return None


def has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Return whether programs for one of `architectures` run on a GPU of that compute capability.

    Machine code (`sm_86`) runs on the same major version from its minor one on; intermediate code (`compute_90`) is
    translated for every later one. A trailing letter (`sm_90a`) is for exactly that one.
    """
    major, minor = capability
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        exact = number[-1:].isalpha()
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdigit():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if exact:
            fits = built == capability
        elif kind == "compute":
            fits = built <= capability
        else:
            fits = built[0] == major and built[1] <= minor
        if fits:
            return True
    return False


def _is_too_old(facts: GpuFacts) -> bool:
    wanted = int((facts.torch_cuda or "0").split(".")[0])
    return facts.driver_cuda is not None and facts.driver_cuda[0] < wanted


def _too_old(facts: GpuFacts) -> Problem:
    wanted = int((facts.torch_cuda or "0").split(".")[0])
    runs = ".".join(str(part) for part in facts.driver_cuda or ())
    oldest = OLDEST_DRIVER.get(wanted)
    return Problem(
        what=f"the NVIDIA driver {facts.driver or ''} is too old for this image".replace("  ", " "),
        why=f"It runs CUDA up to {runs}, and torch {facts.torch} is built with CUDA {facts.torch_cuda}.",
        fix=f"Update the host's driver{f' to {oldest} or newer' if oldest else ''}, or build the image with a torch "
        f'for CUDA {(facts.driver_cuda or (0,))[0]}: `docker build --build-arg TORCH="torch==… --index-url …" .`',
    )


def _without_kernels(facts: GpuFacts) -> Problem:
    gpu = facts.gpus[0]
    return Problem(
        what=f"this image's torch has no kernels for {gpu.name}",
        why=f"Its compute capability is {gpu.capability[0]}.{gpu.capability[1]}, and torch {facts.torch} was built for "
        f"{', '.join(facts.architectures) or 'none'}.",
        fix="Build the image with a torch that supports it (older GPUs: an older CUDA, such as 12.6): "
        '`docker build --build-arg TORCH="torch==… --index-url …" .`, or set `device: cpu`.',
    )

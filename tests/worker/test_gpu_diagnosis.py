"""Each reason why torch cannot compute on a GPU has its own words and its own fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.worker.gpu.diagnosis import Gpu, GpuFacts, diagnose, has_kernels

GOOD = GpuFacts(
    torch="2.13.0",
    torch_cuda="13.0",
    architectures=("sm_75", "sm_80", "sm_90", "compute_120"),
    has_driver=True,
    driver="580.65.06",
    driver_cuda=(13, 0),
    gpus=(Gpu(uuid="GPU-1", name="NVIDIA H100", capability=(9, 0), total_bytes=80 << 30),),
    error="",
)
OLD_GPU = Gpu(uuid="GPU-2", name="Tesla P100", capability=(6, 0), total_bytes=16 << 30)


def test_nothing_is_wrong_with_a_good_one() -> None:
    assert diagnose(GOOD) is None
    assert diagnose(replace(GOOD, gpus=(OLD_GPU, *GOOD.gpus))) is None


@pytest.mark.parametrize(
    ("facts", "what", "fix"),
    [
        (replace(GOOD, torch_cuda=None, gpus=()), "built without CUDA", "--build-arg TORCH"),
        (replace(GOOD, has_driver=False, gpus=()), "no NVIDIA driver is visible", "nvidia-ctk runtime configure"),
        (replace(GOOD, driver="550.54.15", driver_cuda=(12, 4), gpus=()), "550.54.15 is too old", "580 or newer"),
        (replace(GOOD, gpus=(), error="CUDA unknown error"), "no usable GPU", "Failed to initialize NVML"),
        (replace(GOOD, gpus=(OLD_GPU,)), "no kernels for Tesla P100", "older CUDA"),
    ],
)
def test_each_reason_has_its_fix(facts: GpuFacts, what: str, fix: str) -> None:
    problem = diagnose(facts)

    assert problem is not None
    assert what in problem.what
    assert fix in problem.fix


def test_an_older_driver_of_the_same_major_version_is_left_to_torch() -> None:
    assert diagnose(replace(GOOD, torch_cuda="12.8", driver_cuda=(12, 4))) is None


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 6), ("sm_80",), True),  # machine code of the same major version, from its minor one on
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_80",), False),
        ((9, 0), ("compute_80",), True),  # intermediate code is translated for what is newer
        ((7, 0), ("compute_75",), False),
        ((9, 0), ("sm_90a",), True),  # exactly that one
        ((9, 1), ("sm_90a",), False),
        ((12, 0), ("sm_120",), True),
        ((9, 0), ("gfx90a", "sm_"), False),
    ],
)
def test_kernels_run_where_nvidia_says(capability: tuple[int, int], architectures: tuple[str, ...], runs: bool) -> None:
    assert has_kernels(capability, architectures) is runs

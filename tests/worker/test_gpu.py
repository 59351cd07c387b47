"""What torch and the driver say of the GPU: on this machine, whatever it has; computing on it where it has one."""

from __future__ import annotations

import pytest
import torch

from runner.protocol.errors import LaunchError
from runner.worker.gpu.device import look, use
from runner.worker.gpu.diagnosis import diagnose


def test_the_facts_are_those_of_torch() -> None:
    facts = look()

    assert facts.torch == torch.__version__
    assert facts.torch_cuda == torch.version.cuda
    assert (diagnose(facts) is None) == torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_is_found_by_its_uuid_and_computes() -> None:
    facts = look()

    assert diagnose(facts) is None
    assert facts.driver_cuda is not None
    for gpu in facts.gpus:
        assert gpu.uuid.startswith(("GPU-", "MIG-"))
        assert use(gpu.uuid) == gpu.name
    assert torch.cuda.current_device() == len(facts.gpus) - 1


@pytest.mark.parametrize("fault", ["does not compute", "computes wrongly"])
def test_a_faulty_gpu_is_named(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine has a broken GPU to test on: one is played, whose first product fails or is wrong."""

    def ones(*shape: int, device: str) -> torch.Tensor:
        assert device == "cuda"
        if fault == "does not compute":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.full(shape, 0.5)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "Faulty")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _index: None)
    monkeypatch.setattr(torch, "ones", ones)

    with pytest.raises(LaunchError, match=f"Faulty {fault}"):
        use("")

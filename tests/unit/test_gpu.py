"""What torch and the driver say of the GPU: on this machine, whatever it has; computing on it where it has one."""

from __future__ import annotations

import pytest
import torch

from runner.diagnosis import diagnose
from runner.gpu import look, use


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

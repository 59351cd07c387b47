"""Which GPUs, and sizes of memory, as a user writes them."""

from __future__ import annotations

import pytest

from runner.supervisor.inputs.gpus import Gpus, parse_gpus, parse_size

UUID = "GPU-8f3c2a10-1b2c-4d5e-8f90-0123456789ab"


@pytest.mark.parametrize(
    ("text", "gpus", "visible"),
    [
        ("all", Gpus(), None),
        ("none", Gpus(count=0), ""),
        ("2", Gpus(count=2), "0,1"),
        ("device=0", Gpus(devices=("0",)), "0"),
        ("0, 2", Gpus(devices=("0", "2")), "0,2"),
        (f"{UUID},1", Gpus(devices=(UUID, "1")), f"{UUID},1"),
        ("0:1,0:2", Gpus(devices=("0:1", "0:2")), "0:1,0:2"),
    ],
)
def test_a_choice_is_read_and_shown(text: str, gpus: Gpus, visible: str | None) -> None:
    assert parse_gpus(text) == gpus
    assert parse_gpus(gpus.display) == gpus
    assert gpus.visible_devices == visible
    assert gpus.is_none is (text == "none")


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "first", "0,0", "0,", "device=", "0;rm", "GPU-"])
def test_what_is_no_choice_is_refused(text: str) -> None:
    assert parse_gpus(text) is None


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("20GB", 20 * 10**9), ("20 GiB", 20 << 30), ("1.5gb", 1_500_000_000), ("512MiB", 512 << 20), ("7B", 7)],
)
def test_a_size_has_a_unit(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["20", "GB", "-1GB", "1e3GB", "20 GBs", "20,5GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert parse_size(text) is None

"""The table of the image's size and start, and the parts of an image; a start itself is measured in tests/e2e."""

from __future__ import annotations

import pytest

from bench.cold_start import rows, step_of

FOUND = {
    "load": 0.5,
    "cores": 2,
    "size_bytes": 1_700_000_000,
    "layers": [
        {"size_bytes": 400_000_000, "step": "Python and its system"},
        {"size_bytes": 800_000_000, "step": "torch"},
        {"size_bytes": 100_000_000, "step": "torch"},
    ],
    "starts": [{"first_line_s": first, "ready_s": 3.0 + first, "gone_s": 5.0} for first in (0.5, 0.9, 0.7)],
}


def test_the_table_has_the_median_and_the_range() -> None:
    table = dict(rows(FOUND))

    assert table["size, unpacked"] == "1.70 GB"
    assert table["… torch"] == "0.90 GB"
    assert table["`docker run` until the first line of the log"] == "0.7 s (0.5 to 0.9)"
    assert table["… until the worker is ready"] == "3.7 s (3.5 to 3.9)"


@pytest.mark.parametrize(
    "command, step",
    [
        ("/bin/sh -c pip install --no-cache-dir ${TORCH}", "torch"),
        ("|1 TORCH=x /bin/sh -c pip install -r requirements.lock", "transformers, peft and what they need"),
        ("/bin/sh -c #(nop) COPY dir:1 in ./runner", "this action"),
        ("", "Python and its system"),
    ],
)  # fmt: skip
def test_a_layer_is_told_by_its_command(command: str, step: str) -> None:
    assert step_of(command) == step

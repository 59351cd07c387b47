"""Nothing is tagged after a failed verdict: the merged folder is damaged on the disk before the judge reads it."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from tests.supervisor.run.conftest import TARGET, Action


def _flip_a_bit_as_soon_as_it_is_there(work: Path, done: threading.Event) -> None:
    while not done.is_set():
        for folder in work.glob("lora-merge-*/merged"):
            path = min(folder.glob("*.safetensors"))
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            header = json.loads(content[8 : 8 + length])
            name = next(name for name in header if "q_proj" in name)
            position = 8 + length + header[name]["data_offsets"][0] + 40
            with path.open("r+b") as file:
                file.seek(position)
                file.write(bytes([content[position] ^ 0b1000]))
            return
        time.sleep(0.001)


def test_publishes_nothing_after_a_failed_verdict(action: Action, base: Path, adapter: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = threading.Event()
    damager = threading.Thread(target=_flip_a_bit_as_soon_as_it_is_there, args=(work, done))
    damager.start()

    result = action.publish(base, adapter, "--work-dir", str(work))
    done.set()
    damager.join()

    assert result.code == 8, result.log
    assert result.outputs["status"] == "FAIL"
    assert result.outputs["commit-sha"] == ""
    assert "q_proj" in result.log
    assert action.hub.repo(TARGET) is None
    assert list(work.iterdir()) == []

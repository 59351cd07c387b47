"""Folders to write to: what has no room, cannot be made or is taken is refused before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.protocol.errors import NotEnoughDisk, RunnerError
from runner.supervisor.work import work_folder
from runner.worker.merge.resume import Standing, check_space
from runner.worker.tensors.journal import Journal


def test_a_merge_that_finds_no_room_is_refused(tmp_path: Path) -> None:
    journal = Journal(fingerprint={}, files=())
    standing = Standing(partial=tmp_path, journal_path=tmp_path / "journal", journal=journal, note="")
    check_space(1000, standing)

    with pytest.raises(NotEnoughDisk, match="The merged model needs"):
        check_space(1 << 60, standing)


def test_a_work_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with (
        pytest.raises(RunnerError, match="No folder can be made"),
        work_folder(tmp_path / "file" / "work", tmp_path, say=lambda _line: None),
    ):
        raise AssertionError

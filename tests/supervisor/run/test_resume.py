"""A merge that is killed at any moment leaves nothing, or what the next run goes on from: the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig

from runner.protocol.digests import FileDigest, digest_folder
from tests.parity import models
from tests.supervisor.run.conftest import ROOT, TARGET, Action
from tests.supervisor.run.warm import Kill, Warm, warmed

KILLS = 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base of about 130 MB in 20 shards or so, and two adapters for it."""
    root = tmp_path_factory.mktemp("large")
    config = transformers.LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1408, num_hidden_layers=20, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    models.save_base(transformers.LlamaForCausalLM(config), root / "base", dtype=torch.bfloat16, shard="6MB")
    for seed in (1, 2):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        models.save_adapter(root / "base", root / f"adapter{seed}", lora, seed=seed)
    return root


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    with warmed() as process:
        yield process


@pytest.fixture
def warm(process: subprocess.Popen[str], large: Path, tmp_path: Path) -> Warm:
    return Warm(process=process, base=large / "base", folder=tmp_path)


@pytest.fixture(scope="module")
def expected(
    process: subprocess.Popen[str], large: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[FileDigest, ...]:
    """Return the digests of `adapter1`'s merge, made without interruption."""
    warm = Warm(process=process, base=large / "base", folder=tmp_path_factory.mktemp("whole"))
    assert warm.merge(large / "adapter1") == 0
    assert (warm.resumed(), warm.note()) == (0, "")
    return digest_folder(warm.into)


def _finish(warm: Warm, adapter: Path, expected: tuple[FileDigest, ...], dtype: str = "auto") -> int:
    """Merge to the end, check every byte, and return how many shards were taken over."""
    assert warm.merge(adapter, dtype=dtype) == 0
    assert digest_folder(warm.into) == expected
    assert not warm.partial.exists()
    return warm.resumed()


def _remove(warm: Warm) -> None:
    for path in (warm.into, warm.partial):
        shutil.rmtree(path, ignore_errors=True)
    warm.journal.unlink(missing_ok=True)


def _interrupt(warm: Warm, adapter: Path, *, least: int = 3) -> None:
    """Leave a merge of which at least `least` shards, and not all, are finished."""
    assert warm.merge(adapter) == 0
    warm.into.rename(warm.partial)  # what a kill leaves behind, with a known number of shards
    journal = json.loads(warm.journal.read_text())
    for file in journal["files"][least:]:
        (warm.partial / file["path"]).unlink()
    journal["files"] = journal["files"][:least]
    warm.journal.write_text(json.dumps(journal))


def _kills(seed: int, shards: int, whole_s: Callable[[], float]) -> Iterator[Kill]:
    """Yield kills for ever: at any time of a merge that takes `whole_s`, and at any time after any shard, in turn."""
    moments = random.Random(seed)
    while True:
        yield Kill(after_s=moments.uniform(0.0, whole_s()))
        yield Kill(after_shards=moments.randrange(shards), after_s=moments.uniform(0.0, whole_s() / shards))


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_byte(large: Path, warm: Warm, expected: tuple[FileDigest, ...]) -> None:
    adapter = large / "adapter1"
    shards = sum(file.path.endswith(".safetensors") for file in expected)
    whole_s = [warm.end(adapter).wall_s]
    resumed: list[int] = []
    for kill in islice(_kills(4, shards, lambda: whole_s[-1]), 4 * KILLS):
        _remove(warm)
        end = warm.end(adapter, kill=kill)
        if end.code == 0:  # it was done before: a merge takes as long as this one, then
            whole_s.append(end.wall_s)
            continue
        assert end.code == -signal.SIGKILL
        if warm.into.exists():
            assert digest_folder(warm.into) == expected
        resumed.append(_finish(warm, adapter, expected))
        if len(resumed) == KILLS:
            break

    assert len(resumed) == KILLS
    assert len({count for count in resumed if 0 < count < shards}) > 3, resumed


def test_a_chain_of_kills_comes_to_its_end(large: Path, warm: Warm, expected: tuple[FileDigest, ...]) -> None:
    adapter = large / "adapter1"
    moments = random.Random(5)
    for number in range(5):  # each goes on from the last one's shards, of which there are about 20
        kill = Kill(after_shards=3 * number + moments.randrange(1, 4), after_s=moments.uniform(0.0, 0.01))
        assert warm.end(adapter, kill=kill).code == -signal.SIGKILL

    assert _finish(warm, adapter, expected) >= 13


def test_a_finished_folder_is_checked_and_kept(large: Path, warm: Warm) -> None:
    adapter = large / "adapter1"
    assert warm.merge(adapter) == 0
    expected = digest_folder(warm.into)

    shards = sum(file.path.endswith(".safetensors") for file in expected)
    assert _finish(warm, adapter, expected) == shards


def test_a_wrong_byte_in_a_kept_shard_is_found(large: Path, warm: Warm, expected: tuple[FileDigest, ...]) -> None:
    adapter = large / "adapter1"
    _interrupt(warm, adapter)
    shard = warm.partial / json.loads(warm.journal.read_text())["files"][1]["path"]
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size - 7)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))

    assert _finish(warm, adapter, expected) == 2


@pytest.mark.parametrize("change", ["shorter", "missing", "link", "stray"])
def test_only_whole_shards_of_the_journal_are_kept(
    large: Path, warm: Warm, expected: tuple[FileDigest, ...], change: str
) -> None:
    adapter = large / "adapter1"
    _interrupt(warm, adapter)
    shard = warm.partial / json.loads(warm.journal.read_text())["files"][0]["path"]
    if change == "shorter":
        os.truncate(shard, shard.stat().st_size - 1)
    elif change == "missing":
        shard.unlink()
    elif change == "link":
        shard.rename(warm.folder / "elsewhere")
        shard.symlink_to(warm.folder / "elsewhere")
    else:
        (warm.partial / "model-00099-of-00099.safetensors").write_bytes(b"stray")

    assert _finish(warm, adapter, expected) == (3 if change == "stray" else 2)


@pytest.mark.parametrize("change", ["adapter", "dtype", "base"])
def test_other_inputs_start_anew_and_say_so(large: Path, warm: Warm, change: str) -> None:
    other = {"adapter": large / "adapter2"}.get(change, large / "adapter1")
    dtype = "float16" if change == "dtype" else "auto"
    assert warm.merge(other, dtype=dtype) == 0
    expected = digest_folder(warm.into)
    _remove(warm)
    _interrupt(warm, large / "adapter1")
    if change == "base":
        os.utime(min(warm.base.glob("*.safetensors")))

    assert _finish(warm, other, expected, dtype) == 0
    part = {"adapter": "the adapter", "dtype": "the plan", "base": "the base"}[change]
    assert part in warm.note()
    assert "starts anew" in warm.note()


@pytest.mark.parametrize("content", ["", '{"fingerprint": {}, "files"', "[]", '{"fingerprint": {}, "files": [1]}'])
def test_a_broken_journal_starts_anew(large: Path, warm: Warm, expected: tuple[FileDigest, ...], content: str) -> None:
    adapter = large / "adapter1"
    _interrupt(warm, adapter)
    warm.journal.write_text(content)

    assert _finish(warm, adapter, expected) == 0
    assert "journal cannot be read" in warm.note()


def test_a_folder_of_somebody_else_is_not_touched(large: Path, warm: Warm) -> None:
    warm.into.mkdir()
    (warm.into / "mine").write_text("mine")

    assert warm.merge(large / "adapter1") == 1
    assert (warm.into / "mine").read_text() == "mine"


def _start(action: Action, large: Path, work: Path, tag: str) -> subprocess.Popen[str]:
    flags = ["--adapter-path", str(large / "adapter1"), "--base-model", str(large / "base"), "--work-dir", str(work)]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "entrypoint.py"), *flags, "--target-repo", TARGET, "--tag", tag],
        cwd=action.folder, env=os.environ | action.hub.env(action.token), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_action_resumes_in_its_work_dir(
    action: Action, large: Path, tmp_path: Path, number: signal.Signals
) -> None:
    work, tag = tmp_path / "work", f"v{number.value}"
    journal = work / "lora-merge-run" / "merged.journal.json"
    process = _start(action, large, work, tag)
    while not (journal.exists() and json.loads(journal.read_text())["files"]):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    log, _ = process.communicate(timeout=60)
    assert ("is kept in `work-dir`" in log) == (number is signal.SIGTERM)

    result = action.run(
        "--adapter-path", str(large / "adapter1"), "--base-model", str(large / "base"), "--work-dir", str(work),
        "--target-repo", TARGET, "--tag", tag,
    )  # fmt: skip

    assert result.code == 0, result.log
    assert "shards are taken over from a run that was interrupted" in result.log
    assert result.report["merged"]["shards_resumed"] > 0
    assert list(work.iterdir()) == []


def test_a_second_run_in_the_same_work_dir_has_a_folder_of_its_own(
    action: Action, base: Path, adapter: Path, tmp_path: Path
) -> None:
    flags = ("--adapter-path", str(adapter), "--base-model", str(base), "--mode", "plan", "--work-dir", str(tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "lora-merge-run").symlink_to(elsewhere)

    result = action.run(*flags)

    assert result.code == 0, result.log
    assert list(elsewhere.iterdir()) == []
    assert (tmp_path / "lora-merge-run").is_symlink()

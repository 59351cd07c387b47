"""Bases, adapters and right merges, made once per session and never changed; tests that damage take a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as chatter

from runner.judge.case import Case, open_case
from runner.judge.quality import continuations
from tests.judge.merges import save_merge
from tests.judge.tiny import BASES, lora, save_adapter, save_base
from tests.judge.variants import VARIANTS

Maker = Callable[..., tuple[Path, Path, Path]]
Opener = Callable[..., Case]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose more to waiting threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    chatter.disable_progress_bar()
    yield
    chatter.enable_progress_bar()
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are continued for human readers only, and take 40 % of a judgement of a tiny model: four tokens do here."""
    monkeypatch.setattr(continuations, "NEW_TOKENS", continuations.FEWEST_TOKENS)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bf16 base of every kind."""
    root = tmp_path_factory.mktemp("bases")
    return {kind: save_base(root / kind, kind) for kind in BASES}


@pytest.fixture(scope="session")
def right_merge(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return (base, adapter, merged) of a variant in a dtype; kept for the session."""
    root = tmp_path_factory.mktemp("merges")

    def make(variant: str, dtype: str = "auto") -> tuple[Path, Path, Path]:
        kind, config = VARIANTS[variant]
        adapter, merged = root / variant / "adapter", root / variant / dtype
        if not adapter.exists():
            save_adapter(adapter, bases[kind], config())
        if not merged.exists():
            save_merge(merged, bases[kind], adapter, dtype=dtype)
        return bases[kind], adapter, merged

    return make


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a copy of a folder that the test may change."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def weak(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return (base, adapter, merged) of an adapter that bf16 mostly rounds away."""
    root = tmp_path_factory.mktemp("weak")
    adapter = save_adapter(root / "adapter", bases["llama"], lora(target_modules="all-linear"), strength=0.02)
    return bases["llama"], adapter, save_merge(root / "merged", bases["llama"], adapter)


@pytest.fixture(scope="module")
def open_() -> Iterator[Opener]:
    """Return the case of a base and an adapter; opened once for a dtype."""
    cases: dict[tuple[Path, str], Case] = {}
    with ExitStack() as stack:

        def make(base: Path, adapter: Path, dtype: str = "auto") -> Case:
            if (adapter, dtype) not in cases:
                cases[adapter, dtype] = stack.enter_context(open_case(base, adapter, dtype=dtype))
            return cases[adapter, dtype]

        yield make

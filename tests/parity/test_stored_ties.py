"""Encoder-decoders whose embeddings are stored under another name than transformers saves them under.

transformers ties what is not stored to whichever of the names is, and reports nothing missing; the oracle is the model
that it loads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from runner.judge.judge import judge
from runner.protocol.errors import BrokenCheckpoint
from runner.protocol.verdict import Status
from tests.parity import models, oracle, structures
from tests.parity.pipeline import run_merge

T5_NAMES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
BART_NAMES = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens")
FAMILIES = {
    "T5ForConditionalGeneration": T5_NAMES,
    "UMT5ForConditionalGeneration": T5_NAMES,
    "BartForConditionalGeneration": BART_NAMES,
    "M2M100ForConditionalGeneration": BART_NAMES,
    "PegasusForConditionalGeneration": BART_NAMES,
}
STORED = {"decoder": (2,), "encoder": (1,), "encoder and decoder": (1, 2), "all": (0, 1, 2)}
WEIGHTS = "model.safetensors"


def _base(folder: Path, family: str, stored: tuple[int, ...], *, shift: float = 0.0) -> Path:
    """Save a base whose embeddings are stored under some of their names; each further copy is shifted."""
    models.save_base(structures.build(family), folder, dtype=torch.bfloat16, shard="1GB")
    names = [f"{name}.weight" for name in FAMILIES[family]]
    tensors = load_file(folder / WEIGHTS)
    embeddings = tensors[names[0]]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in names}
    tensors |= {names[place]: embeddings + shift * number for number, place in enumerate(stored)}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def _logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=ids, decoder_input_ids=ids[:, :6]).logits
    return logits


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_merged_and_loads_as_its_base_did(family: str, stored: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", family, STORED[stored])
    targets = ["q", "v"] if "T5" in family else ["q_proj", "v_proj"]
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=targets))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    assert oracle.read_folder(merged.root).keys() == oracle.read_folder(base).keys()
    expected = PeftModel.from_pretrained(oracle.load(base), adapter).merge_and_unload().state_dict()
    after = oracle.load(merged.root).state_dict()
    assert all(torch.equal(tensor, expected[key].bfloat16().float()) for key, tensor in after.items())
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="auto")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


@pytest.mark.parametrize("family", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_copies_that_differ_are_left_apart_as_transformers_leaves_them(family: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", family, STORED["encoder and decoder"], shift=0.25)
    targets = ["q"] if "T5" in family else ["q_proj"]
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=targets))

    _, merged = run_merge(base, adapter, tmp_path / "merged")

    expected = PeftModel.from_pretrained(oracle.load(base), adapter).merge_and_unload().state_dict()
    after = oracle.load(merged.root).state_dict()
    assert all(torch.equal(tensor, expected[key].bfloat16().float()) for key, tensor in after.items())
    assert judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").passed


@pytest.mark.parametrize("stored", ["decoder", "encoder and decoder"])
@pytest.mark.parametrize("family", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
def test_an_adapter_on_the_head_unties_all_of_them(family: str, stored: str, tmp_path: Path) -> None:
    base = _base(tmp_path / "base", family, STORED[stored])
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["lm_head"]))

    _, merged = run_merge(base, adapter, tmp_path / "merged", dtype="float32")

    wanted = _logits(PeftModel.from_pretrained(oracle.load(base), adapter))
    assert torch.allclose(_logits(oracle.load(merged.root)), wanted, rtol=1e-4, atol=1e-5)
    verdict = judge(base=base, adapter=adapter, merged=merged.root, dtype="float32")
    assert verdict.failures == ()
    assert verdict.status is Status.PASS


def test_embeddings_under_no_name_are_missing(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", "BartForConditionalGeneration", ())
    whole = _base(tmp_path / "whole", "BartForConditionalGeneration", (0,))
    adapter = models.save_adapter(whole, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))

    with pytest.raises(BrokenCheckpoint, match="The base lacks"):
        run_merge(base, adapter, tmp_path / "merged")


def test_a_copy_that_was_changed_in_the_merge_fails(tmp_path: Path) -> None:
    base = _base(tmp_path / "base", "BartForConditionalGeneration", STORED["decoder"])
    adapter = models.save_adapter(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj"]))
    _, merged = run_merge(base, adapter, tmp_path / "merged")
    tensors = load_file(merged.root / WEIGHTS)
    extra = tensors["model.decoder.embed_tokens.weight"] * 1.02
    save_file({**tensors, "model.shared.weight": extra}, merged.root / WEIGHTS, {"format": "pt"})

    assert not judge(base=base, adapter=adapter, merged=merged.root, dtype="auto").passed

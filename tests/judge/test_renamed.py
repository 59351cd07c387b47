"""Merges as transformers saves them: other names, dropped copies, other shards. Right values pass, wrong ones fail."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from runner.files.layout import INDEX_FILE, SINGLE_FILE, read_checkpoint
from runner.judge.case import open_case
from runner.judge.judge import judge, judge_merge
from runner.protocol.verdict import Layer, Outcome, Status, Verdict
from tests.judge.tiny import VOCABULARY, lora, save_base, tokenizer

Tensors = dict[str, torch.Tensor]
NAMES = "every tensor has its name, shape and dtype, and none is extra"
FREQUENCIES = "model.layers.{}.self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A base, an adapter, and the merge that PEFT and transformers save of them."""

    base: Path
    adapter: Path
    merged: Path

    def verdict(self) -> Verdict:
        """Return the verdict without the models' run, which a wrong folder does not need."""
        with open_case(self.base, self.adapter, dtype="auto") as case:
            return judge_merge(case, self.merged, end_to_end=False)


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    """Write all tensors of a folder into one file, after `change` has changed them."""
    files = [file.name for file in read_checkpoint(folder).files]
    tensors = {name: value for file in files for name, value in load_file(folder / file).items()}
    change(tensors)
    for file in (*files, INDEX_FILE):
        (folder / file).unlink(missing_ok=True)
    save_file({name: value.clone() for name, value in tensors.items()}, folder / SINGLE_FILE, {"format": "pt"})


def _bare(folder: Path) -> None:
    save_base(folder, "gpt2")

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(folder, change)


def _copies(folder: Path) -> None:
    save_base(folder, "tied")
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))


def _buffers(folder: Path) -> None:
    save_base(folder, "llama")
    rewrite(folder, lambda tensors: tensors.update({FREQUENCIES.format(layer): torch.rand(6) for layer in (0, 1)}))


def _t5(folder: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    rewrite(folder, lambda tensors: tensors.update(dict.fromkeys(copies, tensors["shared.weight"])))


def _old(folder: Path) -> None:
    """Config and tokenizer as older libraries wrote them."""
    save_base(folder, "llama")
    config = json.loads((folder / "config.json").read_bytes())
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "attention_bias")}
    theta = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**kept, "rope_theta": theta, "torch_dtype": "bfloat16"}))
    settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}
    template = folder / "chat_template.jinja"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template.read_text()}))
    template.unlink()


BASES: dict[str, tuple[Callable[[Path], object], LoraConfig]] = {
    "plain": (lambda folder: save_base(folder, "llama"), lora()),
    "biases": (lambda folder: save_base(folder, "qwen2"), lora()),
    "bare": (_bare, lora(target_modules=["c_attn"])),
    "copies": (_copies, lora()),
    "buffers": (_buffers, lora()),
    "t5": (_t5, LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")),
    "old": (_old, lora()),
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("saved")

    def make(kind: str) -> Path:
        folder = root / kind
        if not folder.exists():
            save, config = BASES[kind]
            save(folder / "base")
            _merge_by_peft(folder, config)
        return folder

    return make


def _merge_by_peft(folder: Path, config: LoraConfig) -> None:
    loader = AutoModelForSeq2SeqLM if config.task_type == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    model = get_peft_model(loader.from_pretrained(folder / "base", dtype=torch.float32), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder / "adapter")
    plain = loader.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(plain, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "merged")


@pytest.fixture
def made(kept: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Made]:
    def copy(kind: str) -> Made:
        root = shutil.copytree(kept(kind), tmp_path / "made")
        return Made(base=root / "base", adapter=root / "adapter", merged=root / "merged")

    return copy


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BASES)
def test_a_merge_that_peft_saves_is_right_and_told_so(made: Callable[[str], Made], kind: str) -> None:
    folders = made(kind)
    verdict = judge(base=folders.base, adapter=folders.adapter, merged=folders.merged, dtype="auto")
    assert (verdict.status, verdict.weights, verdict.files) == (Status.PASS,) * 3, verdict.failures
    names = next(check for check in verdict.checks if check.name == NAMES)
    assert (names.outcome is Outcome.WARN) is (kind in ("bare", "copies", "buffers", "t5"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, name",
    [
        ("bare", "transformer.h.0.attn.c_attn.weight"),
        ("bare", "transformer.wte.weight"),
        ("copies", "model.embed_tokens.weight"),
        ("buffers", "model.layers.0.self_attn.q_proj.weight"),
        ("t5", "shared.weight"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_a_wrong_value_under_an_equal_name_fails(made: Callable[[str], Made], kind: str, name: str) -> None:
    folders = made(kind)

    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.int16).view(-1)[7] ^= 1

    rewrite(folders.merged, change)
    verdict = folders.verdict()
    assert (verdict.weights, verdict.files) == (Status.FAIL, Status.PASS)
    assert any(check.layer is Layer.STORAGE for check in verdict.failures)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, change",
    [
        ("bare", lambda tensors: tensors.pop("transformer.ln_f.bias")),
        ("bare", lambda tensors: tensors.update({"ln_f.bias": tensors["transformer.ln_f.bias"]})),  # twice
        ("copies", lambda tensors: tensors.pop("model.embed_tokens.weight")),
        ("buffers", lambda tensors: tensors.update({FREQUENCIES.format(0): torch.rand(6)})),
        ("t5", lambda tensors: tensors.pop("shared.weight")),
        ("t5", lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"] * 2})),
    ],
)
def test_a_lost_or_doubtful_tensor_fails(
    made: Callable[[str], Made], kind: str, change: Callable[[Tensors], object]
) -> None:
    folders = made(kind)
    rewrite(folders.merged, change)
    assert folders.verdict().weights is Status.FAIL


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "key, value", [("rope_theta", 5.0), ("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("dtype", "float16")]
)
def test_a_config_that_loads_as_another_fails(made: Callable[[str], Made], key: str, value: object) -> None:
    folders = made("old")
    path = folders.merged / "config.json"
    config = json.loads(path.read_bytes())
    config |= {"rope_parameters": {**config["rope_parameters"], key: value}} if key == "rope_theta" else {key: value}
    path.write_text(json.dumps(config))
    verdict = folders.verdict()
    assert verdict.weights is Status.FAIL
    assert any("config.json" in check.name for check in verdict.failures)


@pytest.mark.filterwarnings("ignore")
def test_a_lost_vocabulary_fails_the_files_and_not_the_weights(made: Callable[[str], Made]) -> None:
    folders = made("plain")
    (folders.merged / "tokenizer.json").unlink()
    verdict = folders.verdict()
    assert (verdict.status, verdict.files) == (Status.FAIL, Status.FAIL)
    assert all(check.layer is Layer.FILES for check in verdict.failures)
    assert verdict.parts_text == "Weights: NOT_VERIFIED. Files: FAIL."  # since the models did not run

"""Layer by layer, a model gives the bits that it gives in memory: base, unmerged and merged, for many architectures."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from runner.judge.distances import relative
from runner.judge.expected.filling import Filling
from runner.judge.expected.unmerged import load_unmerged
from runner.judge.forward import outputs_of
from runner.judge.prompts import TokenSequence
from runner.judge.streaming import stream as stream_module
from runner.judge.streaming.loader import load_folder
from runner.judge.streaming.models import model_class, quiet
from runner.judge.streaming.stages import WHOLE, find_stages
from runner.judge.streaming.stream import Origin, Stream, Task
from runner.judge.variants import Models
from tests.parity import structures

VOCAB = structures.VOCAB
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "T5ForConditionalGeneration": {
        "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4,
        "decoder_start_token_id": 0, "eos_token_id": 1,
    },
    "BartForConditionalGeneration": {
        "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 56,
        "decoder_ffn_dim": 56, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "eos_token_id": 1,
        "max_position_embeddings": 64,
    },
    "BertForSequenceClassification": {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "AlbertForMaskedLM": {
        "vocab_size": VOCAB, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64,
    },
    "SiglipVisionModel": structures.VISION,  # asks for the dtype of a weight before the stage that has it
}  # fmt: skip
ARCHITECTURES = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel",
    "PhiForCausalLM", "StableLmForCausalLM", "GPTNeoXForCausalLM", "FalconForCausalLM", "Cohere2ForCausalLM",
    "OPTForCausalLM", "MambaForCausalLM", "FalconH1ForCausalLM", "Llama4ForCausalLM", *ENCODERS,
)  # fmt: skip
ONE_STAGE = ("BartForConditionalGeneration",)  # a stored buffer of its own beside the layers
TARGETS: Mapping[str, Any] = {
    "MixtralForCausalLM": ["q_proj", "v_proj"],
    "Qwen3MoeForCausalLM": ["q_proj", "v_proj"],
    "GptOssForCausalLM": ["q_proj", "v_proj"],
    "Llama4ForCausalLM": ["q_proj", "v_proj"],
    "MambaForCausalLM": ["in_proj", "x_proj"],
    "FalconH1ForCausalLM": ["q_proj", "in_proj"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A base, an adapter on it, and another checkpoint of the same class in the place of a merge."""

    base: Path
    adapter: Path
    merged: Path
    sequences: tuple[TokenSequence, ...]


class _NoFilling(Filling):
    """These tests bring no E."""

    def __init__(self) -> None:
        self.misplaced = ""
        self.differs = False


def _build(architecture: str, seed: int) -> PreTrainedModel:
    if architecture in structures.TEXT_MODELS:
        model = structures.build(architecture)
    else:
        found = getattr(transformers, architecture)
        model = found(found.config_class(**ENCODERS[architecture]))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _world(root: Path, architecture: str) -> World:
    for name, seed in (("base", 1), ("merged", 2)):
        _build(architecture, seed).bfloat16().save_pretrained(root / name, max_shard_size="20KB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model_class(root / "base").from_pretrained(root / "base", dtype=torch.float32)
        targets = TARGETS.get(architecture, "all-linear")
        adapted = get_peft_model(plain, LoraConfig(r=4, target_modules=targets))
        torch.manual_seed(3)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(root / "adapter")
    return World(base=root / "base", adapter=root / "adapter", merged=root / "merged", sequences=_sequences(VOCAB))


def _sequences(vocabulary: int) -> tuple[TokenSequence, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        TokenSequence(
            label=str(length), ids=torch.randint(3, vocabulary, (length,), generator=generator), is_text=False
        )
        for length in (5, 24, 33)  # more than a sliding window
    )


def _models(world: World, attention: str | None = None) -> Models:
    options = {} if attention is None else {"attn_implementation": attention}
    unmerged = load_unmerged(load_folder(world.base, **options), world.adapter, ())
    loaded = load_folder(world.merged, **options)
    return Models(unmerged=unmerged, loaded=loaded, filling=_NoFilling(), device="cpu")


def _streamed(world: World, attention: str | None = None) -> list[dict[str, torch.Tensor]]:
    models = _models(world, attention)
    stream = Stream(origins=(models.base, models.merged()), device="cpu")
    found = dict(stream.results(_tasks(world)))
    return [found[number] for number in range(len(world.sequences))]


def _tasks(world: World) -> list[Task]:
    def task(sequence: TokenSequence) -> Task:
        return Task(compute=lambda model: outputs_of(model, sequence, "cpu"), tokens=len(sequence.ids))

    return [task(sequence) for sequence in world.sequences]


def _in_memory(world: World) -> list[dict[str, torch.Tensor]]:
    """Return what transformers and PEFT compute when they load everything."""
    with warnings.catch_warnings(), torch.no_grad(), quiet():
        warnings.simplefilter("ignore")
        base = model_class(world.base).from_pretrained(world.base, dtype=torch.float32).eval()
        merged = model_class(world.merged).from_pretrained(world.merged, dtype=torch.float32).eval()
        plain = [outputs_of(base, sequence, "cpu") for sequence in world.sequences]
        found = [outputs_of(merged, sequence, "cpu") for sequence in world.sequences]
        unmerged = PeftModel.from_pretrained(base, world.adapter).eval().get_base_model()
        mine = [outputs_of(unmerged, sequence, "cpu") for sequence in world.sequences]
    names = ("base", "unmerged", "merged")
    return [dict(zip(names, three, strict=True)) for three in zip(plain, mine, found, strict=True)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_what_the_model_in_memory_gives(architecture: str, tmp_path: Path) -> None:
    world = _world(tmp_path, architecture)
    wanted, found = _in_memory(world), _streamed(world)
    assert (find_stages(load_folder(world.base).model) == WHOLE) == (architecture in ONE_STAGE)
    for one, other in zip(wanted, found, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-5, atol=1e-6, msg=name)  # sums in another order
        assert not torch.equal(one["base"], one["unmerged"])
        assert not torch.equal(one["base"], one["merged"])


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "SiglipVisionModel"])
def test_computes_in_float64_where_that_is_wanted(architecture: str, tmp_path: Path) -> None:
    world = _world(tmp_path, architecture)
    whole = model_class(world.base).from_pretrained(world.base, dtype=torch.float32).eval().double()
    models = _models(world)
    sequence = world.sequences[0]
    task = Task(compute=lambda model: outputs_of(model, sequence, "cpu", torch.float64), tokens=5)
    stream = Stream(origins=(models.base,), device="cpu", dtype=torch.float64)
    ((_, found),) = stream.results([task])
    with torch.no_grad():
        assert torch.equal(found["base"], task.compute(whole))
        assert not torch.equal(found["base"], outputs_of(whole.float(), sequence, "cpu"))


def test_a_model_that_looks_into_its_stages_is_taken_whole(tmp_path: Path, monkeypatch: Any) -> None:
    world = _world(tmp_path, "LlamaForCausalLM")
    wanted = _streamed(world)
    forward = transformers.LlamaForCausalLM.forward

    def looking(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits + 0 * self.model.layers[0].mlp.up_proj.weight.sum()
        return outputs

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", functools.wraps(forward)(looking))
    _is_taken_whole(_models(world), world, wanted)


def test_a_stage_that_is_given_a_tensor_without_values_is_taken_whole(tmp_path: Path) -> None:
    world = _world(tmp_path, "LlamaForCausalLM")
    wanted = _streamed(world)
    models = _models(world)
    for variant in models.base.variants:
        layer = variant.model.model.layers[0].mlp.up_proj

        def move(_: Any, given: tuple[torch.Tensor], layer: Any = layer) -> tuple[torch.Tensor]:
            return (given[0].to(layer.weight.data.device),)

        variant.model.get_input_embeddings().register_forward_pre_hook(move)
    _is_taken_whole(models, world, wanted)


def _is_taken_whole(models: Models, world: World, wanted: list[dict[str, torch.Tensor]]) -> None:
    stream = Stream(origins=(models.base,), device="cpu")
    found = dict(stream.results(_tasks(world)))
    assert stream.whole
    for number, made in found.items():
        assert all(torch.equal(made[name], wanted[number][name]) for name in made)


@pytest.mark.parametrize("limits", [{"WAVE_TOKENS": 30}, {"GROUP_BYTES": 1}], ids=str)
def test_waves_and_groups_change_nothing(limits: dict[str, int], tmp_path: Path, monkeypatch: Any) -> None:
    world = _world(tmp_path, "Gemma3ForCausalLM")
    wanted = _streamed(world)
    for name, value in limits.items():
        monkeypatch.setattr(stream_module, name, value)
    for one, other in zip(wanted, _streamed(world), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_reads_every_tensor_of_each_checkpoint_once(tmp_path: Path) -> None:
    world = _world(tmp_path, "MixtralForCausalLM")
    models = _models(world)
    read: dict[str, list[str]] = {"base": [], "merged": []}
    origins = []
    for name, origin in (("base", models.base), ("merged", models.merged())):

        def reading(keys: Iterable[str], device: str, name: str = name, origin: Origin = origin) -> Any:
            wanted = list(keys)
            read[name] += wanted
            return origin.read(wanted, device)

        origins.append(replace(origin, read=reading))
    dict(Stream(origins=tuple(origins), device="cpu").results(_tasks(world)))
    for name, folder in (("base", world.base), ("merged", world.merged)):
        assert sorted(read[name]) == sorted(load_folder(folder).model.state_dict())


def test_an_error_in_a_layer_ends_all_runs(tmp_path: Path) -> None:
    world = _world(tmp_path, "LlamaForCausalLM")
    models = _models(world)
    before = threading.active_count()
    with (world.merged / "config.json").open() as file:
        assert file.read()
    for shard in world.merged.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises((SafetensorError, OSError, RuntimeError)):
        dict(Stream(origins=(models.base, models.merged()), device="cpu").results(_tasks(world)))
    assert threading.active_count() <= before + 4  # the loader's own pool may take a moment


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_attention_and_threads_stay_far_below_the_limit(architecture: str, tmp_path: Path) -> None:
    world = _world(tmp_path, architecture)
    wanted = _streamed(world)
    eager = _streamed(world, attention="eager")
    torch.set_num_threads(2)
    try:
        parallel = _streamed(world)
    finally:
        torch.set_num_threads(1)
    for other in (eager, parallel):
        for one, two in zip(wanted, other, strict=True):
            assert all(relative(one[name], two[name]) < 1e-5 for name in one)

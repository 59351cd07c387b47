"""What a message tells to do is done, from the message's own words, and works; what nothing here can do is not told."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from runner.files.adapter.combinable import check_combinable
from runner.files.adapter.folder import read_adapter
from runner.protocol.allow import ALLOWANCES
from runner.protocol.combination import KINDS, Combination
from runner.protocol.errors import InputError
from runner.supervisor.inputs.read import INPUTS, parse
from runner.supervisor.signature import read_signing_key
from tests.contract.ways_out import CODE, shown, spans, texts, texts_of
from tests.parity import models
from tests.parity.pipeline import run_merge
from tools.messages import GAP, ROOT

NAMES = {spec.name: spec for spec in INPUTS}
GOOD = {"adapter-path": "owner/adapter", "target-repo": "owner/merged", "tag": "v1.0.0", "hf-token": "hf_localtoken"}


# --- Settings: the reader of the inputs takes them. ---


def _accepts(values: dict[str, str], argv: tuple[str, ...] = ()) -> None:
    """Fail if the reader of the inputs finds a problem with one of `values`."""
    given = {f"INPUT_{name.upper()}": value for name, value in {**GOOD, **values}.items()}
    try:
        parse(given, list(argv))
    except InputError as error:
        told = [problem.what for problem in error.problems]
        assert not [what for what in told if any(f"`{name}`" in what for name in values)], told


def _setting(span: str) -> None:
    name, _, value = span.partition(": ")
    assert name in NAMES
    _accepts({name: value.replace(GAP, "float32")})


def _destination(span: str) -> None:
    _accepts({"target-repo": span})


def _flag(span: str) -> None:
    concrete = span.replace(f"--{GAP}", "--tag").replace("NAME", "tag").replace("VALUE", "v9").replace(GAP, "pickle")
    inputs = parse({f"INPUT_{name.upper()}": value for name, value in GOOD.items()}, concrete.split())
    assert inputs.tag == "v9" or "pickle" in inputs.allow


def _yaml(span: str) -> None:
    assert isinstance(yaml.safe_load(span), dict), span


def _trigger(span: str) -> None:
    """The trigger is a workflow's, and its event gives the tag."""
    assert yaml.safe_load(span) == {"on": {"release": {"types": ["published"]}}} or yaml.safe_load(span) == {
        True: {"release": {"types": ["published"]}}
    }


def _known(span: str) -> None:
    """It is a value of an input, or a field of PEFT's LoRA."""
    values = {value for spec in INPUTS for value in spec.choices} | set(KINDS) | set(ALLOWANCES)
    peft_fields = {field.name for config in PEFT_TYPE_TO_CONFIG_MAPPING.values() for field in fields(config)}
    limits = {"perplexity-ratio"}
    assert span in values | peft_fields | limits | {"true", "false", "all", "none"}, span


def _pointer(span: str) -> None:
    """It is a command of git's extension for large files, which pointers are of."""
    assert span.split()[:2] == ["git", "lfs"]


def _key(span: str, tmp: Path) -> None:
    """The key that the command prints can sign."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    pem = subprocess.run(span.split(), check=True, capture_output=True, text=True).stdout
    read_signing_key(pem)


# --- PEFT's own names, and its own calls on a tiny model. ---


def small_base(folder: Path) -> Path:
    return models.save_base(models.llama(tied=False), folder, dtype=torch.float32)


def trained(base: Path, config: LoraConfig, *, rows: int | None = None) -> PeftModel:
    """Return a PEFT model of `config` whose adapter is not zero."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(3)
    return _shaken(get_peft_model(model, config))


def _shaken(model: PeftModel) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)


def _save_pretrained(span: str, tmp: Path) -> None:
    base = small_base(tmp / "base")
    model, folder = trained(base, lora()), tmp / "adapter"
    eval(f"model.{span}(folder)", {"model": model, "folder": folder})  # noqa: S307  (the words of our own message)
    run_merge(base, folder, tmp / "merged")


def _save_apart(span: str, tmp: Path) -> None:
    base = small_base(tmp / "base")
    model = trained(base, lora())
    model.add_adapter("other", lora())
    _shaken(model)
    eval(span, {"model": model, "folder": tmp / "apart", "name": "other"})  # noqa: S307
    run_merge(base, tmp / "apart" / "other", tmp / "merged")


def _gather(span: str, tmp: Path) -> None:
    base = small_base(tmp / "base")
    model = trained(base, lora())
    whole = eval(span, {"model": model, "accelerator": Accelerator(cpu=True)})  # noqa: S307
    model.save_pretrained(str(tmp / "adapter"), state_dict=whole)
    run_merge(base, tmp / "adapter", tmp / "merged")


def _of_deepspeed(span: str, _tmp: Path) -> None:
    """It is the setting that accelerate asks for; DeepSpeed needs a GPU."""
    assert span.partition(":")[0] in inspect.getsource(Accelerator.get_state_dict)


def _allowed(span: str, _tmp: Path) -> None:
    assert span.removesuffix(GAP) in ALLOWANCES
    _accepts({"allow": span.removesuffix(GAP) + "0.13"})


def _save_embeddings(span: str, tmp: Path) -> None:
    base = small_base(tmp / "base")
    model = trained(base, lora(), rows=models.VOCAB + 4)
    eval(f"model.save_pretrained(folder, {span})", {"model": model, "folder": tmp / "adapter"})  # noqa: S307
    plan, _ = run_merge(base, tmp / "adapter", tmp / "merged")
    assert any("100 rows" in note for note in plan.summary.notes)


def _convert(span: str, tmp: Path) -> None:
    """A PiSSA adapter becomes a plain LoRA, which has the same merge, and can be combined."""
    base = small_base(tmp / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        lora(init_lora_weights="pissa"),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp / "initial"))
    model.peft_config["default"].init_lora_weights = "pissa"
    _shaken(model).save_pretrained(str(tmp / "plain"), **{span: str(tmp / "initial")})
    key = "model.layers.0.self_attn.q_proj.weight"
    wanted = model.merge_and_unload().state_dict()[key]

    kind = Combination(kind="cat", weights=(1.0, 1.0), density=None, seed=None, majority_sign=None)
    check_combinable([read_adapter(tmp / "plain")] * 2, kind)
    _, merged = run_merge(base, tmp / "plain", tmp / "merged")
    found = torch.cat([load_file(path)[key] for path in merged.root.glob("*.safetensors") if key in load_file(path)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# --- What this machine cannot run: said by our own page, or taken by our own build. ---


def _documented(span: str) -> None:
    """The page on runners says the same, word by word, so that the two cannot drift apart."""
    page = " ".join((ROOT / "docs/gpu-runners.md").read_text("utf-8").split())
    for command in span.split(" && "):
        assert command.removeprefix("sudo ") in page, command


def _build(span: str) -> None:
    argument = re.search(r"--build-arg (\w+)=", span)
    assert argument is not None
    assert re.search(rf"^ARG {argument[1]}=", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


def _docker_run(span: str) -> None:
    """Docker's own options, which `docker run --help` lists."""
    known = {"-e", "-v", "--gpus", "--rm"}
    assert {word for word in span.split() if word.startswith("-")} <= known


# Words that a message is about: fields, files, variables, events, values of other programs. `nvidia-smi`, `dmesg`
# and `docker info` show something and change nothing.
QUOTED = frozenset({
    "-----BEGIN", ".gitignore", ".yaml", "0.5", "0,2", "2", "20GB", "20GiB", "30", "/srv/hf-cache", "$job", "HF_TOKEN",
    "HOME", "INPUT_", "USER", "__metadata__", "actions/checkout", "content", "contributor", "device=0", "dmesg",
    "docker info", "https://", "https", "main", "messages", "nvidia-container-toolkit", "nvidia-smi", "nvidia-smi -L",
    "owner/name", "owner/name@revision", "peft_version", "prompt", "read", "release", ".git",
    "release.tag_name", "role", "task", "weight_map", "workflow_dispatch", "workflow_run.event", "write", "--gpus",
    "Failed to initialize NVML: Unknown Error", "do_sample: false", "--user", ".lock",
    "metadata", "scale", "state_dict", "dir://", "staging/…", "--help",
})  # fmt: skip
# What `docs/gpu-runners.md` says too, to be run on the machine with the GPU, as root; no test can.
ELSEWHERE = (r"sudo nvidia-ctk .*",)
Executor = Callable[[str, Path], object]
NAMED = "|".join(map(re.escape, NAMES))


def _plainly(check: Callable[[str], object]) -> Executor:
    return lambda span, _tmp: check(span)


# The first pattern that is the whole span says how to do what the span says.
EXECUTORS: tuple[tuple[str, Executor], ...] = (
    (NAMED, lambda span, _tmp: NAMES[span]),
    ("|".join(map(re.escape, QUOTED)), lambda _span, _tmp: None),
    (rf"(?:{NAMED}): [\w{GAP}.-]+", _plainly(_setting)),
    (r"hf-token: \$\{\{ secrets\.HF_TOKEN \}\}|lfs: true|permissions: \{.*\}|resources: \{.*\}", _plainly(_yaml)),
    (r"on: .*", _plainly(_trigger)),
    (r"dir:\S+", _plainly(_destination)),
    (rf"--(?:NAME|allow|{GAP})(?:[ =](?:VALUE|{GAP}))?", _plainly(_flag)),
    (r"model\.save_pretrained\(folder, selected_adapters=\[name\]\)", _save_apart),
    (r"save_pretrained", _save_pretrained),
    (r"save_embedding_layers=True", _save_embeddings),
    (r"path_initial_model_for_weight_conversion", _convert),
    (r"accelerator\.get_state_dict\(model\)", _gather),
    (r"stage3_\w+: true", _of_deepspeed),
    (rf"peft={GAP}?", _allowed),
    (r"docker build .*", _plainly(_build)),
    (r"docker run .*", _plainly(_docker_run)),
    (r"git lfs pull", _plainly(_pointer)),
    (r"openssl ecparam .*", _key),
    *((pattern, _plainly(_documented)) for pattern in ELSEWHERE),
    (r"[a-z0-9_-]+", _plainly(_known)),
)  # fmt: skip


def executor_of(span: str) -> Executor | None:
    """Return what does as a span says; None where nothing does."""
    return next((run for pattern, run in EXECUTORS if re.fullmatch(pattern, span)), None)


@pytest.mark.parametrize("span", sorted(shown()))
def test_what_a_message_shows_can_be_done(span: str, tmp_path: Path) -> None:
    run = executor_of(span)

    assert run is not None, f"{shown()[span]} shows `{span}`: write what does it, or do not show it"
    run(span, tmp_path)


def test_code_is_shown_in_backticks_so_that_none_is_missed() -> None:
    for name, text in texts():
        bare = re.sub(r"`[^`]*`", "", text)
        if " " in text.strip() and (found := CODE.search(bare)):
            assert name in _NO_MESSAGES, f"{name}: {found[0]!r} in {text!r}"


# Programs of their own: what they run, and what they write into a page that has tests of its own.
_NO_MESSAGES = {"runner/supervisor/report/summary.py"}


@pytest.mark.parametrize(
    "recipe",
    [
        "`from_pretrained(…, quantization_config=FineGrainedFP8Config(dequantize=True))`",
        "`save_pretrained(folder, save_original_format=False)`",
        "`pip install something`",
        "`rm -rf ~`",
    ],
)
def test_a_recipe_that_nothing_does_is_found_and_fails(recipe: str) -> None:
    source = f"""raise Broken("It is broken.", why="So.", fix=f"Do {{this}}: {recipe}.")"""

    (span,) = [span for text in texts_of(source) for span in spans(text)]

    assert executor_of(span) is None


def test_a_setting_that_the_reader_does_not_take_fails() -> None:
    with pytest.raises(AssertionError):
        _setting("mode: publsh")


# --- Ways out in words: each is followed as the error says it, on the folder that caused it. ---

"""Hostile bases and adapters: nothing of them is run, nothing outside of them is read, and each is refused or harmless.

The supervisor's and the worker's own code, in this process: whatever is no `RunnerError` would be exit code 70.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.files.adapter.folder import read_adapter
from runner.protocol.errors import RunnerError
from runner.protocol.events import Event, Job, Judged
from runner.protocol.limits import Evaluation, Limits
from runner.protocol.rounding import Rounding
from runner.protocol.verdict import Verdict
from runner.worker.main import run
from tests.judge.tiny import lora, save_adapter, save_base
from tests.security.damage import pickle_that_makes, rewrite_header

DEEP = "[" * 100_000 + "]" * 100_000


@dataclass(frozen=True)
class Place:
    """Where one attack happens: `marker` must never appear, and `secret` never leave its folder."""

    base: Path
    adapter: Path
    marker: Path
    secret: Path


Attack = Callable[[Place], object]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    save_adapter(root / "adapter", save_base(root / "base", "llama"), lora())
    return root


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Place:
    for name in ("base", "adapter"):
        shutil.copytree(models / name, tmp_path / name)
    secret = tmp_path / "elsewhere" / "id_ed25519"
    secret.parent.mkdir()
    secret.write_text("a secret of the runner")
    return Place(base=tmp_path / "base", adapter=tmp_path / "adapter", marker=tmp_path / "ran", secret=secret)


def edited(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def config_of_adapter(**fields: Any) -> Attack:
    return lambda place: edited(place.adapter / "adapter_config.json", **fields)


def config_of_base(**fields: Any) -> Attack:
    return lambda place: edited(place.base / "config.json", **fields)


def config_of_tokenizer(**fields: Any) -> Attack:
    return lambda place: edited(place.base / "tokenizer_config.json", **fields)


def text_of(folder: str, name: str, content: str | bytes) -> Attack:
    def attack(place: Place) -> None:
        path = getattr(place, folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return attack


def code(place: Place) -> str:
    return f"import pathlib\npathlib.Path({str(place.marker)!r}).write_text('ran')\n"


def code_in_the_base(place: Place) -> None:
    (place.base / "modeling_evil.py").write_text(code(place) + "class Evil: ...\n")
    mapping = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil")
    edited(place.base / "config.json", auto_map=mapping)


def code_for_the_tokenizer(place: Place) -> None:
    (place.base / "tokenization_evil.py").write_text(code(place) + "class Evil: ...\n")
    edited(place.base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})


def code_by_the_adapter(place: Place) -> None:
    (place.adapter / "evil.py").write_text(code(place) + "class Evil: ...\n")
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    edited(place.adapter / "adapter_config.json", auto_mapping=mapping, task_type=None)


def code_of_another_library(place: Place) -> None:
    mapping = {"base_model_class": "system", "parent_library": "os"}
    edited(place.adapter / "adapter_config.json", auto_mapping=mapping, task_type=None)


def renamed_tensor(name: str) -> Attack:
    def change(entries: dict[str, Any]) -> None:
        entries[name] = entries.pop(next(key for key in entries if key != "__metadata__"))

    return lambda place: rewrite_header(place.adapter / "adapter_model.safetensors", change)


def pickled(place: Place) -> None:
    (place.adapter / "adapter_model.safetensors").unlink()
    (place.adapter / "adapter_model.bin").write_bytes(pickle_that_makes(place.marker))


def pickled_base(place: Place) -> None:
    for path in [*place.base.glob("*.safetensors"), *place.base.glob("*.index.json")]:
        path.unlink()
    (place.base / "pytorch_model.bin").write_bytes(pickle_that_makes(place.marker))


def index_leads_to(name: str) -> Attack:
    def attack(place: Place) -> None:
        path = place.base / "model.safetensors.index.json"
        entries = json.loads(path.read_text())["weight_map"]
        edited(path, weight_map={**entries, min(entries): name})

    return attack


def huge_header(place: Place) -> None:
    path = place.adapter / "adapter_model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def endless_header(place: Place) -> None:
    text = DEEP.encode()
    (place.adapter / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def template(text: str) -> Attack:
    def attack(place: Place) -> None:
        for name in ("chat_template.jinja", "chat_template.json"):
            (place.base / name).unlink(missing_ok=True)
        (place.base / "chat_template.jinja").write_text(text.replace("MARKER", str(place.marker)))

    return attack


def named(folder: str, name: str) -> Attack:
    return lambda place: (getattr(place, folder) / name).write_text("x")


REFUSED: Mapping[str, tuple[Attack, str]] = {
    "an adapter that is a pickle": (pickled, "safetensors"),
    "a base that is a pickle": (pickled_base, "pytorch_model.bin"),
    "an index that leads up": (index_leads_to("../elsewhere/id_ed25519"), "elsewhere"),
    "an index with an absolute path": (index_leads_to("/etc/passwd"), "/etc/passwd"),
    "an index that names a device": (index_leads_to("/dev/zero"), "/dev/zero"),
    "a header of 4 EiB": (huge_header, "not a sound safetensors file"),
    "a header of 100000 brackets": (endless_header, "safetensors"),
    "a config of 100000 brackets": (text_of("adapter", "adapter_config.json", DEEP), "adapter_config.json"),
    "a base's config of 100000 brackets": (text_of("base", "config.json", DEEP), "config.json"),
    "an index of 100000 brackets": (text_of("base", "model.safetensors.index.json", DEEP), "weight index"),
    "a config that is no object": (text_of("adapter", "adapter_config.json", "[1]"), "not a JSON object"),
    "a config in another encoding": (text_of("adapter", "adapter_config.json", b"\xff\xfe{\x00}\x00"), "unknown"),
    "a method that is a list": (config_of_adapter(peft_type=["LORA"]), "LORA"),
    "a method that is a path": (config_of_adapter(peft_type="../../LORA"), "../../LORA"),
    "a rank of a trillion": (config_of_adapter(r=10**12), "`r`"),
    "a negative rank": (config_of_adapter(r=-4), "`r`"),
    "a rank of nothing": (config_of_adapter(r=0), "`r`"),
    "a rank that is text": (config_of_adapter(r="4; rm -rf /"), "`r`"),
    "a scaling that is no number": (config_of_adapter(lora_alpha=float("nan")), "lora_alpha"),
    "patterns that are a list": (config_of_adapter(rank_pattern=[["q_proj", 8]]), "rank_pattern"),
    "a field of nobody": (config_of_adapter(__reduce__="os.system"), "__reduce__"),
    "an expression that is none": (config_of_adapter(target_modules="(["), "target_modules"),
    "a tensor with a line break in its name": (renamed_tensor("base_model.x\n::error::y.lora_A.weight"), "lora_A"),
    "a tensor whose name leads up": (renamed_tensor("../../../../tmp/x"), "tmp/x"),
    "an architecture of another module": (config_of_base(architectures=["os.system"]), "os.system"),
    "an architecture that is no model": (config_of_base(architectures=["Trainer"]), "Trainer"),
    "a size of 10^18": (config_of_base(hidden_size=10**18), "config.json"),
    "a negative number of layers": (config_of_base(num_hidden_layers=-1), "base"),
    "a type that nobody knows": (config_of_base(model_type="../x"), "../x"),
    "a file name with a line break": (named("base", "a\nb.json"), "name"),
    "a file name with a command": (named("base", "a\r::set-output name=x::y.json"), "name"),
    "a file name that is no text": (named("base", os.fsdecode(b"a\xff.json")), "name"),
}  # fmt: skip

HARMLESS: Mapping[str, Attack] = {
    "code beside the base": code_in_the_base,
    "code for the tokenizer": code_for_the_tokenizer,
    "a template that looks for classes": template("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "a template that opens a file": template("{{ cycler.__init__.__globals__.os.popen('touch MARKER').read() }}"),
    "a template that imports": template("{% import 'os' as os %}{{ os.system('touch MARKER') }}"),
    "a template that raises": template("{{ raise_exception('::error::x') }}"),
    "a template that is broken": template("{% for %}"),
    "commands in the chat template": template("{{ '::error::x\n##[error]y' }}{{ messages[0]['content'] }}"),
    "commands in the config": config_of_base(_name_or_path="::error::x\n##[error]y"),
    "a name of the base with commands": config_of_adapter(base_model_name_or_path="::add-mask::a\r\n##[error]b"),
    "a base that is a path": config_of_adapter(base_model_name_or_path="/etc/passwd"),
    "a revision that is an option": config_of_adapter(revision="--upload-pack=touch x"),
    "a generation config of nonsense": text_of("base", "generation_config.json", '{"temperature": "::x"}'),
}  # fmt: skip

EITHER: Mapping[str, Attack] = {
    "a generation config of 100000 brackets": text_of("base", "generation_config.json", DEEP),
    "a class of the adapter's own": code_by_the_adapter,
    "a class of another library": code_of_another_library,
    "a tokenizer of 100000 brackets": text_of("base", "tokenizer.json", DEEP),
    "a tokenizer config that is a list": text_of("base", "tokenizer_config.json", "[]"),
    "a tokenizer that names no class": config_of_tokenizer(tokenizer_class="os.system"),
    "a token of a megabyte": config_of_tokenizer(bos_token="x" * (1 << 20)),
    "layers beyond the model": config_of_adapter(layers_to_transform=[10**9]),
}  # fmt: skip


def judged(place: Place, tmp_path: Path) -> Verdict:
    """Do what supervisor and worker do with two local folders."""
    read_adapter(place.adapter)
    events: list[Event] = []
    job = Job(
        base=place.base, adapters=(place.adapter,), combination=None, merged=tmp_path / "merged", merges=True,
        verifies=True, dtype="auto", rounding=Rounding(), evaluation=Evaluation(), limits=Limits(), device="cpu",
        prompts=("##[error]x", "a\r::error::y"), seed=0,
    )  # fmt: skip
    run(job, events.append)
    return next(event.verdict for event in events if isinstance(event, Judged))


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_by_name(name: str, place: Place, tmp_path: Path) -> None:
    attack, text = REFUSED[name]
    attack(place)

    with pytest.raises(RunnerError) as caught:
        judged(place, tmp_path)

    assert text in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert not place.marker.exists()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", HARMLESS)
def test_does_no_harm(name: str, place: Place, tmp_path: Path) -> None:
    HARMLESS[name](place)

    verdict = judged(place, tmp_path)

    assert verdict.passed, [check for check in verdict.checks if check.outcome.value != "PASS"]
    assert not place.marker.exists()


@pytest.mark.parametrize("name", EITHER)
def test_is_refused_or_does_no_harm(name: str, place: Place, tmp_path: Path) -> None:
    EITHER[name](place)

    with contextlib.suppress(RunnerError):
        judged(place, tmp_path)

    assert not place.marker.exists()


def test_code_that_is_imported_would_be_seen(place: Place) -> None:
    exec(compile(code(place), "evil", "exec"))  # noqa: S102  (that the marker works is what is tested)

    assert place.marker.exists()

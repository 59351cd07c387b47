"""Tiny bases and adapters with heads of their own, and PEFT's own merge of them as the oracle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from runner.architecture.names import map_names
from tests.parity import oracle

AUTO = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """How an adapter was trained.

    Attributes:
        task: PEFT's task type, or None for PEFT's plain wrapper around `model_class`.
        options: of the LoRA.
        labels: of the head, or None for the class's own number.
        model_class: what it was trained on; by default the task's auto class.
        rows: of the vocabulary, where the training changed it.
    """

    task: str | None
    options: dict[str, Any] = field(default_factory=dict)
    labels: int | None = None
    model_class: Any = None
    rows: int | None = None

    def load(self, base: Path, *, untie: bool = False) -> PreTrainedModel:
        """Return the base in float32 as the user loaded it for training."""
        chosen = self.model_class or AUTO[str(self.task)]
        labels = {} if self.labels is None else {"num_labels": self.labels, "ignore_mismatched_sizes": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: PreTrainedModel = chosen.from_pretrained(base, dtype=torch.float32, **labels)
            if self.rows is not None:
                model.resize_token_embeddings(self.rows, mean_resizing=False)
        if untie:
            for key, source in model.all_tied_weights_keys.items():
                owner, _, name = key.rpartition(".")
                copy = torch.nn.Parameter(model.get_parameter(source).detach().clone())
                setattr(model.get_submodule(owner), name, copy)
        return model


def save_adapter(base: Path, folder: Path, trained: Trained, *, scale: float = 0.05, seed: int = 3) -> Path:
    """Save a random LoRA of `trained` on the base, head and all, as training would leave it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": trained.task, **trained.options})
    peft_model = get_peft_model(trained.load(base), config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * scale
    peft_model.save_pretrained(folder)
    return folder


def peft_merge(base: Path, adapter: Path, trained: Trained, *, untie: bool = False) -> dict[str, torch.Tensor]:
    """Return stored name → float32 tensor of PEFT's merge, for all that the merged model has."""
    torch.set_num_threads(1)
    model = PeftModel.from_pretrained(trained.load(base, untie=untie), adapter).merge_and_unload(safe_merge=False)
    state = model.state_dict()
    names = map_names(model, oracle.read_folder(base)).renamed
    stored = {name: state[key] for key, name in names.items()}
    ties = {} if untie else dict(model.all_tied_weights_keys)
    tied = {key for pair in ties.items() if names.keys() & set(pair) for key in pair}
    return stored | {key: state[key] for key in state.keys() - names.keys() - tied}

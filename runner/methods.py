"""What each PEFT method needs of the base, and the PEFT class of each task.

Tables only; `runner.attach` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from peft.peft_model import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

# Methods that do not look at the base's values when they are attached. All others get the base in float32 in
# memory, because what they derive from it (norms, principal directions) must not be derived from rounded values.
LAZY_METHODS = frozenset(
    """LORA ADALORA LOHA LOKR IA3 OFT BOFT VERA PVERA FOURIERFT WAVEFT HRA VBLORA MISS RANDLORA ROAD SHIRA C3A GRALORA
    LN_TUNING TRAINABLE_TOKENS""".split()
)
LAZY_LORA_INITS = (True, False, "gaussian", "orthogonal", "eva", None)
TASK_CLASSES: Mapping[str | None, type[PeftModel]] = {
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
    "SEQ_CLS": PeftModelForSequenceClassification,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    None: PeftModel,
}

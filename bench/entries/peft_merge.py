"""PEFT as its documentation says: load in the base's dtype, merge_and_unload, save_pretrained."""

import json
import sys
import time

from peft import PeftModel
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

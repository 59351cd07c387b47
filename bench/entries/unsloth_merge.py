"""unsloth's `save_pretrained_merged`, 16 bit, on its CPU backend."""

import json
import sys
import time

from unsloth import FastLanguageModel  # first: it patches transformers and peft

import torch  # isort: skip

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    model, tokenizer = FastLanguageModel.from_pretrained(
        adapter, load_in_4bit=False, dtype=torch.bfloat16, max_seq_length=2048
    )
    model.save_pretrained_merged(out, tokenizer, save_method="merged_16bit")
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

"""`axolotl merge-lora`, with its default method `memory_efficient`: shard by shard."""

import json
import sys
import time
from pathlib import Path

from axolotl.cli.merge_lora import do_cli

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    training = {  # what its schema asks for besides the two models; the merge uses none of it
        "datasets": [{"path": "unused", "type": "alpaca"}],
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "learning_rate": 1e-4,
        "optimizer": "adamw_torch", "sequence_len": 2048, "bf16": "auto",
        "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True,
    }  # fmt: skip
    config = {"base_model": base, "lora_model_dir": adapter, "adapter": "lora", "output_dir": "axolotl", **training}
    Path("axolotl.yml").write_text(json.dumps(config))
    do_cli(config="axolotl.yml")
    Path("axolotl/merged").rename(out)
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

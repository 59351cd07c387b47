"""`llamafactory-cli export` on the CPU.

It imports torchaudio for audio inputs, and the wheels of torchaudio need CUDA: an empty module stands in its place.
"""

import importlib.machinery
import json
import sys
import time
import types

sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

from llamafactory.train.tuner import export_model  # noqa: E402  (after the stand-in)

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    arguments = {
        "model_name_or_path": base, "adapter_name_or_path": adapter, "export_dir": out, "template": "empty",
        "finetuning_type": "lora", "export_size": 5, "export_device": "cpu", "export_legacy_format": False,
        "infer_dtype": "auto",
    }  # fmt: skip
    export_model(arguments)
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

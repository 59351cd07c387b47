"""mergekit's `base+adapter` syntax, as `mergekit-yaml --lazy-unpickle` runs it; its cache of merged LoRAs is cold."""

import json
import sys
import time

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    models = [{"model": f"{base}+{adapter}"}]
    configuration = {"merge_method": "passthrough", "models": models, "dtype": "bfloat16"}
    options = MergeOptions(
        lora_merge_cache="mergekit-cache", lora_merge_dtype="bfloat16", lazy_unpickle=True, quiet=True
    )
    run_merge(MergeConfiguration.model_validate(configuration), out, options=options)
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

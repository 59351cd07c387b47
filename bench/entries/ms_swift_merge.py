"""`swift export --merge_lora true`."""

import json
import sys
import time

from swift.pipelines import export_main

if __name__ == "__main__":
    base, out, adapter = sys.argv[1:4]
    started = time.monotonic()
    arguments = [
        "--model", base, "--model_type", "llama", "--template", "llama", "--adapters", adapter,
        "--merge_lora", "true", "--output_dir", out, "--torch_dtype", "bfloat16", "--device_map", "cpu",
    ]  # fmt: skip
    export_main(arguments)
    print(json.dumps({"after_imports_s": time.monotonic() - started}))

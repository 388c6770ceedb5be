"""Runs the README's first Python block with whatever this interpreter has: `python tests/workers/first_snippet.py`.

`scripts/test.sh` starts it in an environment that holds the core install alone. The block loads
`models/smollm2-135m-instruct`; a tiny Llama from a config is put there.
"""

import importlib.metadata
import importlib.util
import os
import re
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, LlamaConfig

README = Path(__file__).parents[2] / "README.md"
# What only the extras bring, if nothing in the core needs it.
EXTRAS = ("datasets", "jiwer", "matplotlib", "ruamel", "soundfile", "soxr", "tensorboard")


def main() -> None:
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        raise SystemExit(f"this is no core install: it has {', '.join(present)}")
    block = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    if block is None:
        raise SystemExit(f"{README} has no Python block")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=256
    )
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["CONDFT_CACHE"] = "off"
        AutoModelForCausalLM.from_config(config).save_pretrained("models/smollm2-135m-instruct")
        exec(compile(block[1], "README.md", "exec"), {"__name__": "__main__"})
        os.chdir(README.parent)  # a folder that is somebody's working directory cannot be removed everywhere
    count = len({distribution.name for distribution in importlib.metadata.distributions()})
    print(f"the README's first snippet runs on a core install of {count} distributions")


if __name__ == "__main__":
    main()

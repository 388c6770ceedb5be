"""Peak memory of analyzing a checkpoint that is never instantiated, and whether the report equals the loaded model's.

Each measurement is a process of its own, since peak memory never goes down:

    python -m scripts.bench.analyzer.streaming write FOLDER     # a 4-layer Llama-8B-shaped bf16 checkpoint, 3.9 GB
    python -m scripts.bench.analyzer.streaming baseline         # bytes of an interpreter with torch loaded
    python -m scripts.bench.analyzer.streaming streamed FOLDER REPORT
    python -m scripts.bench.analyzer.streaming loaded FOLDER REPORT
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from condft.runtime.memory import peak_rss_bytes

LAYERS = 4
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_GIB = 2**30


def write(folder: Path) -> None:
    """Seeded Gaussian weights, a shard a layer, as from_pretrained would find them."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=LAYERS,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        part = name.split(".layers.")[1].split(".")[0] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{part}.safetensors", {})[name] = shape
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {name: (torch.randn(shape, generator=generator) * 0.02).bfloat16() for name, shape in names.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config.save_pretrained(folder)


def analyzed(folder: Path, report: Path, *, loaded: bool) -> dict[str, Any]:
    """Analyzes in this process, saves the report; returns seconds and the process's peak bytes so far."""
    from condft.analysis.analyze import analyze

    source: Any = folder
    if loaded:
        from transformers import AutoModelForCausalLM

        source = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    began = time.perf_counter()
    found = analyze(source, progress=False, cache=False)
    found.save(report)
    return {"seconds": time.perf_counter() - began, "peak_bytes": peak_rss_bytes()}


def rows_of(report: Path) -> list[dict[str, Any]]:
    """The rows of a saved report."""
    rows: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["rows"]
    return rows


def streaming(folder: Path) -> dict[str, Any]:
    """All measurements; the checkpoint in the folder is used if it is there, and written otherwise."""

    def run(*arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "scripts.bench.analyzer.streaming", *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        value: dict[str, Any] = json.loads(output.splitlines()[-1])
        return value

    if not (folder / "config.json").is_file():
        run("write", str(folder))
    baseline = run("baseline")["peak_bytes"]
    reports = {kind: folder / f"{kind}.json" for kind in ("streamed", "loaded")}
    figures = {kind: run(kind, str(folder), str(path)) for kind, path in reports.items()}
    rows = [rows_of(path) for path in reports.values()]
    return {
        "layers": LAYERS,
        "baseline_gib": baseline / _GIB,
        "streamed_gib_above_baseline": (figures["streamed"]["peak_bytes"] - baseline) / _GIB,
        "loaded_gib_above_baseline": (figures["loaded"]["peak_bytes"] - baseline) / _GIB,
        "target_gib": 1.5,
        "streamed_seconds": figures["streamed"]["seconds"],
        "loaded_seconds": figures["loaded"]["seconds"],
        "equal_rows": rows[0] == rows[1],
        "rows": len(rows[0]),
    }


def main() -> None:
    kind, *paths = sys.argv[1:]
    if kind == "write":
        write(Path(paths[0]))
        print(json.dumps({}))
    elif kind == "baseline":
        # A product, so that what torch loads for one is part of the baseline.
        torch.ones(2, 2) @ torch.ones(2, 2)
        print(json.dumps({"peak_bytes": peak_rss_bytes()}))
    else:
        print(json.dumps(analyzed(Path(paths[0]), Path(paths[1]), loaded=kind == "loaded")))


if __name__ == "__main__":
    main()

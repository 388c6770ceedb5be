"""One process of tests/tasks/speech/test_features.py: `features.py RANK FOLDER WHISPER LLAMA MANIFEST`."""

import sys
from pathlib import Path

import torch

from condft.tasks.speech import compose_audio_llm, compute_features, load_manifest


def main(rank: int, folder: Path, whisper: str, llama: str, manifest: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model, processor = compose_audio_llm(whisper, llama, max_seconds=2)
    clips = load_manifest(manifest).clips
    calls: list[int] = []
    model.model.audio_tower.register_forward_hook(lambda module, inputs, output: calls.append(rank))
    results = {}
    for name, cache in (("shared", folder / "cache"), ("separate", folder / f"cache-{rank}")):
        calls.clear()
        features = compute_features(model, processor, clips, cache_dir=cache, batch_size=1, progress=False)
        results[name] = {"features": features, "calls": len(calls)}
    torch.save(results, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

"""One process of a two-process test of tests/weights: `units.py RANK FOLDER`; FOLDER holds a checkpoint."""

import sys
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from condft import analyze
from condft.report import SkippedWeight
from condft.weights.walk import iter_units


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    units = [item for item in iter_units(model) if not isinstance(item, SkippedWeight)]
    assert all(unit.collective for unit in units)
    for granularity in ("tensor", "head"):
        analyze(model, granularity=granularity, progress=False).save(folder / f"{granularity}-{rank}.json")
    assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))

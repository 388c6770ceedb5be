"""One rank of test_sharing: `python -m tests.workers.distributed CASE RANK FOLDER`; leaves `CASE-RANK.json`."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from condft import NonFiniteWeightError, analyze
from condft.analysis import measure as measuring_module
from tests.helpers.tiny_llama import build_tiny_llama

Answers = dict[str, object]


def all_routes() -> nn.Module:
    """Large enough that not every weight goes to the SVD."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shapes = [(300, 60), (300, 300), (100, 100), (300, 270), (40, 40), (300, 600)]
        layers = [nn.Linear(columns, rows) for rows, columns in shapes]
        with torch.no_grad():
            layers[2].weight[:, 0] *= 1e-8  # past what a Gram matrix tells of a square
        return nn.Sequential(*layers)


def replicated(rank: int, folder: Path) -> Answers:
    model = build_tiny_llama()
    answers = {
        "plain": analyze(model, progress=False),
        "routes": analyze(all_routes(), progress=False),
        "all": analyze(model, measures="all", progress=False),
        "kept": analyze(model, keep_lowest=5, progress=False),
        "stratified": analyze(model, keep_lowest=2, stratify="module_type", progress=False),
        "names": analyze(model, names=["lm_head.weight", "model.embed_tokens.weight"], progress=False),
    }
    # Alone, while the other rank does not even call it.
    if rank == 1:
        answers["alone"] = analyze(model, shared=False, progress=False)
    return {name: report.to_dict() for name, report in answers.items()}


def meta(rank: int, folder: Path) -> Answers:
    """As `cpu_ram_efficient_loading` leaves it: the weights on the first rank alone."""
    if rank == 0:
        model = build_tiny_llama()
    else:
        with torch.device("meta"):
            model = build_tiny_llama()
    return {"plain": analyze(model, progress=False).to_dict()}


def sharded(rank: int, folder: Path) -> Answers:
    model = build_tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cache = folder / f"cache-{rank}"  # of its own, so that one can see who writes
    answers = {"plain": analyze(model, progress=False, cache=cache).to_dict()}
    answers["again"] = analyze(model, progress=False, cache=cache).to_dict()
    answers["kept"] = analyze(model, keep_lowest=5, progress=False).to_dict()
    answers["head"] = analyze(model, granularity="head", progress=False).to_dict()
    return answers


def _message(work: Callable[[], object]) -> str:
    try:
        work()
    except (ValueError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(rank: int, folder: Path) -> Answers:
    """What goes wrong on one rank alone is told on both, and the next analysis works."""
    here = folder / "checkpoint" if rank == 0 else folder / "nowhere"
    answers: Answers = {"file": _message(lambda: analyze(here, progress=False))}
    broken = folder / ("checkpoint" if rank == 0 else "broken")
    answers["shard"] = _message(lambda: analyze(broken, progress=False))
    narrow = nn.Linear(3, 2 + rank)
    answers["shapes"] = _message(lambda: analyze(narrow, progress=False))
    model = build_tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = torch.inf
    mesh = init_device_mesh("cpu", (2,))
    for kind in ("replicated", "sharded"):
        if kind == "sharded":
            fully_shard(model, mesh=mesh)
        try:
            analyze(model, progress=False)
        except NonFiniteWeightError as error:
            answers[kind] = [str(error), error.names, error.report.to_dict()]
    return answers


def late(rank: int, folder: Path) -> Answers:
    """An error in the middle of the work, while the other rank waits in the gathers."""
    model = build_tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if rank == 1:
        facts, calls = measuring_module.spectral_facts, []

        def fail_at_third(*args: object, **options: object) -> object:
            calls.append(args)
            if len(calls) == 3:
                raise ValueError("the third matrix is one too many")
            return facts(*args, **options)  # type: ignore[arg-type]

        measuring_module.spectral_facts = fail_at_third  # type: ignore[assignment]
    return {"late": _message(lambda: analyze(model, progress=False))}


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    work = {"replicated": replicated, "meta": meta, "sharded": sharded, "errors": errors, "late": late}[case]
    (folder / f"{case}-{rank}.json").write_text(json.dumps(work(rank, folder)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

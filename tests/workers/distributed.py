"""One process of tests/analysis/test_distributed: `... CASE RANK FOLDER`; it writes `CASE-RANK.json`."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from condft import CondFTConfig, NonFiniteWeightError, analyze
from condft.analysis import measure as measure_module
from condft.weights import walk as walk_module
from tests.helpers.models.tiny_llama import build_tiny_llama

Answers = dict[str, object]


def all_routes() -> nn.Module:
    """Large enough that not every weight goes to the SVD."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        shapes = [(300, 60), (300, 300), (100, 100), (300, 270), (40, 40), (300, 600)]
        layers = [nn.Linear(columns, rows) for rows, columns in shapes]
        with torch.no_grad():
            layers[2].weight[:, 0] *= 1e-8  # past what a Gram matrix resolves in a square
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
    # Alone, while the other process does not even call it.
    if rank == 1:
        answers["alone"] = analyze(model, shared=False, progress=False)
    return {name: report.to_dict() for name, report in answers.items()}


def meta(rank: int, folder: Path) -> Answers:
    """As `cpu_ram_efficient_loading` leaves it: the weights on the first process alone."""
    return {"plain": analyze(_meta_elsewhere(rank), progress=False).to_dict()}


def _meta_elsewhere(rank: int) -> nn.Module:
    with torch.device("cpu" if rank == 0 else "meta"):
        return build_tiny_llama()


def adapter_replicated(rank: int, folder: Path) -> Answers:
    return _adapter(build_tiny_llama())


def adapter_meta(rank: int, folder: Path) -> Answers:
    return _adapter(_meta_elsewhere(rank))


def _adapter(model: nn.Module) -> Answers:
    """How often the units are walked for an adapter, and what it trains."""
    walks, items = [], walk_module._Walk.items

    def counted(walk: walk_module._Walk) -> Iterator[object]:
        walks.append(walk)
        return items(walk)

    walk_module._Walk.items = counted  # type: ignore[assignment,method-assign]
    config = CondFTConfig(num_tensors=5)
    get_peft_model(model, config)
    names = ("target_units", "base_digests", "report_fingerprint", "selected_by")
    return {"walks": len(walks), **{name: getattr(config, name) for name in names}}


def sharded(rank: int, folder: Path) -> Answers:
    model = build_tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    cache = folder / f"cache-{rank}"  # of its own, so that one can see which process writes
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
    """What goes wrong on one process alone is an error on both, and the next analysis works."""
    path = folder / "checkpoint" if rank == 0 else folder / "nowhere"
    answers: Answers = {"file": _message(lambda: analyze(path, progress=False))}
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
    """An error in the middle of the work, while the other process waits in the gathers."""
    model = build_tiny_llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    if rank == 1:
        facts, calls = measure_module.spectral_facts, []

        def fail_at_third(*args: object, **options: object) -> object:
            calls.append(args)
            if len(calls) == 3:
                raise ValueError("the third matrix is one too many")
            return facts(*args, **options)  # type: ignore[arg-type]

        measure_module.spectral_facts = fail_at_third  # type: ignore[assignment]
    return {"late": _message(lambda: analyze(model, progress=False))}


def main(case: str, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    cases = (replicated, meta, sharded, adapter_replicated, adapter_meta, errors, late)
    work = {function.__name__: function for function in cases}[case]
    (folder / f"{case}-{rank}.json").write_text(json.dumps(work(rank, folder)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

"""Everything that only a GPU can show, each part in a process of its own with a time budget.

    python -m scripts.bench.gpu                               # all parts on CUDA, into docs/results/gpu.json
    python -m scripts.bench.gpu --device cpu --small          # the same code at a size that means nothing: its test
    python -m scripts.bench.gpu --only routes --only step     # some parts; the others of an existing file are kept

The file is written after every part. A part that fails, finds a problem, or runs out of time does not stop the others;
the exit status is then 1, and the file lists it under `failed`. `bash scripts/gpu_check.sh` installs what is carried
along and runs this.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from condft.files.atomic import write_json
from scripts.bench.gpu.part import Place, Result
from scripts.bench.results import made_by

__all__ = ["PARTS", "main", "run_part"]

PARTS = {
    "routes": ("analyzer.routes", 60.0),
    "batches": ("analyzer.batches", 60.0),
    "kappa_of_8b": ("analyzer.kappa_of_8b", 90.0),
    "step": ("steps.training_step", 120.0),
    "offload_base": ("steps.offload_base", 60.0),
    "quickstart": ("quickstart.quickstart", 150.0),
    "tests": ("suite.gpu_tests", 180.0),
}
"""Name -> function of this package, and its budget in seconds. In this order: should the time end early, the figures
are there. Imported by the part's own process alone: an import that fails fails that part, not all of them."""
TOTAL_SECONDS = 590.0  # of all parts together; each also ends when these are over
_TAIL = 2000  # characters of a failed part's error output that are kept


def run_part(name: str, place: Place, seconds: float) -> Result:
    """Runs a part in a new process: an illegal access or a full memory on the device ends with that process.

    Returns:
        `ok`, `seconds`, and `result` or `error`.
    """
    command = [sys.executable, "-m", "scripts.bench.gpu", "--part", name, "--device", place.device]
    command += ["--small"] * place.small
    began = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1.0), check=False)
    except subprocess.TimeoutExpired:
        return {"ok": False, "seconds": seconds, "error": f"not done after its budget of {seconds:.0f} s"}
    taken = round(time.perf_counter() - began, 1)
    if done.returncode:
        return {"ok": False, "seconds": taken, "error": done.stderr[-_TAIL:]}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return {"ok": not result["problems"], "seconds": taken, "result": result}


def part_of(name: str) -> Callable[[Place], Result]:
    """The function of a part."""
    module, _, function = PARTS[name][0].partition(".")
    found: Callable[[Place], Result] = getattr(import_module(f"scripts.bench.gpu.{module}"), function)
    return found


def about(place: Place) -> dict[str, Any]:
    """The device, the commit and the versions behind the figures."""
    name = torch.cuda.get_device_name() if place.device == "cuda" else platform.processor() or "cpu"
    cuda = torch.version.cuda if place.device == "cuda" else None
    return {"device": name, "cuda": cuda, "small": place.small, **made_by("python -m scripts.bench.gpu", 1)}


def check(place: Place, names: Sequence[str], out: Path) -> list[str]:
    """Runs the parts and writes the file after each; returns the names of those that failed, of all in the file."""
    kept = out.exists() and set(names) != set(PARTS)
    content: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if kept else {"parts": {}}
    content |= about(place)
    ends = time.perf_counter() + TOTAL_SECONDS
    for name in names:
        print(f"{name} ...", flush=True)
        found = run_part(name, place, min(PARTS[name][1], ends - time.perf_counter()))
        content["parts"][name] = {"commit": content["commit"], **found}
        content["failed"] = sorted(part for part, each in content["parts"].items() if not each["ok"])
        write_json(out, content)
        reason = "" if found["ok"] else f": {found.get('error') or found['result']['problems']}"
        print(f"{name}: {'ok' if found['ok'] else 'FAILED'}, {found['seconds']:.0f} s{reason}", flush=True)
    failed: list[str] = content["failed"]
    return failed


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes: every line runs, no figure means anything")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="leave the other parts out")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu.json"))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)  # in this process, JSON to stdout
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a part failed or there is no such device."""
    options = arguments_of(arguments)
    place = Place(options.device, options.small)
    os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the parts: nothing may wait for a network
    if place.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else accelerate takes a GPU that happens to be there
    elif not torch.cuda.is_available():
        print("no CUDA device; --device cpu --small tests the code itself", file=sys.stderr)
        return 1
    if options.part:
        print(json.dumps(part_of(options.part)(place)))
        return 0
    failed = check(place, options.only or list(PARTS), options.out)
    print(f"{options.out}: {'failed: ' + ', '.join(failed) if failed else 'every part is ok'}")
    return 1 if failed else 0

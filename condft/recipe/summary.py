"""What a run says of itself: the facts of `summary.json`, and a table for people."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from condft.runtime.console import console

__all__ = ["code_commit", "machine", "print_summary", "versions"]

_PACKAGES = ("condft", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of every package whose behavior the figures depend on."""
    return {"python": ".".join(map(str, sys.version_info[:3])), **{name: version(name) for name in _PACKAGES}}


def code_commit() -> str | None:
    """Commit of the checkout that this package runs from, `-dirty` appended if tracked files differ from it.

    None for an installation outside of a git checkout (or without git).
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if dirty else "")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures were made on: processor, cores, memory and accelerator."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on Linux
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_summary(summary: Mapping[str, Any], output_dir: str | Path) -> None:
    """The table at the end of a run: learned beside forgotten."""
    table = Table(title="what was learned, and what was forgotten", caption=str(output_dir), title_justify="left")
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for language in ("", *sorted(key.removeprefix("wer_before_") for key in summary if key.startswith("wer_before_"))):
        suffix = f"_{language}" if language else ""
        before, after = summary[f"wer_before{suffix}"], summary[f"wer_after{suffix}"]
        whole = "unheard voices" if summary["unheard_voices"] else "test split"
        label = f"word error rate, {language or whole}"
        table.add_row(label, f"{before:.1%}", f"{after:.1%}", f"{after - before:+.1%}")
    before, after = summary["text_ce_before"], summary["text_ce_after"]
    table.add_row("text cross-entropy (nats/token)", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    table.add_row("KL(base ‖ adapted) (nats/token)", "0", f"{summary['kl_to_base']:.4f}", "")
    frozen = "unchanged, bit for bit" if summary["frozen_unchanged"] else "CHANGED"
    table.add_row(f"{summary['frozen_checked']} base tensors", "", frozen, "")
    share = summary["trainable_parameters"] / summary["total_parameters"]
    table.add_row(
        "trained parameters",
        "",
        f"{summary['trainable_parameters']:,}",
        f"{share:.1%} of {summary['total_parameters']:,}",
    )
    table.add_row("selected weights", "", str(summary["num_selected"]), "")
    minutes = f"{summary['seconds_total'] / 60:.1f} min"
    table.add_row("time, peak memory", "", minutes, f"{summary['peak_rss_bytes'] / 2**30:.1f} GiB")
    console().print(table)

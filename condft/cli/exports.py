"""Files for other programs: rows as CSV, a selection as JSON or as an `unfrozen_parameters` list."""

import csv
import dataclasses
from pathlib import Path

from condft.files.atomic import atomic_path, write_json, write_text
from condft.report import SpectralReport, SpectralRow
from condft.selection.select import Selection

__all__ = ["write_rows", "write_selection", "write_unfrozen_parameters"]


def write_rows(report: SpectralReport, path: Path) -> None:
    """Writes one line for each unit, without its spectrum. A shape is `576x192`, a missing value empty."""
    names = [field.name for field in dataclasses.fields(SpectralRow) if field.name != "spectrum"]
    # newline="": the csv module writes its own line ends, and Windows would add to them.
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in report.rows:
            values = [getattr(row, name) for name in names]
            writer.writerow("x".join(map(str, value)) if isinstance(value, tuple) else value for value in values)


def write_selection(selection: Selection, report: SpectralReport, path: Path, *, order: str) -> None:
    """Writes JSON whose `target_units` and `report_fingerprint` are the fields of that name of `CondFTConfig`."""
    write_json(
        path,
        {
            "target_units": list(selection.names),
            "score": selection.score,
            "order": order,
            "stratify": selection.stratify,
            "num_parameters": selection.num_parameters,
            "model": report.model,
            "report_fingerprint": report.fingerprint,
        },
    )


def write_unfrozen_parameters(selection: Selection, path: Path) -> None:
    r"""Writes YAML with the list `unfrozen_parameters`: one anchored regular expression for each parameter.

    Spectrum's readers give each expression to `re.match` unchanged. axolotl first puts a backslash before every dot,
    so `\.` would become `\\.` and match nothing. `[.]` matches a dot in both.

    Raises:
        ValueError: A chosen unit is a part of a parameter, and the list can name whole parameters only.
    """
    parts = [name for name in selection.names if name.endswith("]")]
    if parts:
        raise ValueError(
            f"{len(parts)} of the {len(selection.names)} chosen units are parts of a parameter, such as {parts[0]!r}, "
            "and unfrozen_parameters can name whole parameters only: use --out and CondFTConfig(target_units=...), "
            "or select from a report of whole tensors (--granularity tensor)"
        )
    patterns = ["^" + name.replace(".", "[.]") + "$" for name in selection.names]
    # Written by hand: Spectrum's example readers take the list line by line, so that quotes or a folded line, which a
    # YAML library may write, would break them. `^name$` needs no quotes in YAML.
    write_text(path, "unfrozen_parameters:\n" + "".join(f"- {pattern}\n" for pattern in patterns))

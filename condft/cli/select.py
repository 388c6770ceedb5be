"""`condft select`: units chosen from a report, as files for CondFTConfig, axolotl and Spectrum's readers."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from condft.cli.errors import UserErrors, checked_picture
from condft.report import Role
from condft.selection.scores import Score
from condft.selection.select import CANDIDATE_ROLES, Order

__all__ = ["select"]


def select(
    report: Annotated[Path, typer.Argument(help="Report of condft analyze --json.")],
    num_tensors: Annotated[int | None, typer.Option(help="Budget: that many units. 100 without any budget.")] = None,
    trainable_fraction: Annotated[
        float | None, typer.Option(help="Budget: fraction in (0, 1] of the candidates' parameters.")
    ] = None,
    max_condition_number: Annotated[float | None, typer.Option(help="Budget: every unit of at most this κ.")] = None,
    score: Annotated[Score, typer.Option(help="What ranks.")] = "condition_number",
    order: Annotated[Order, typer.Option(help="lowest is the method; the others are controls.")] = "lowest",
    stratify: Annotated[
        Literal["module_type", "none"], typer.Option(help="Rank within each module type, or across all.")
    ] = "module_type",
    seed: Annotated[int, typer.Option(help="Of the random order.")] = 0,
    include_roles: Annotated[
        list[Role] | None,
        typer.Option(help="More candidates than layers and experts: units of this role. Repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write names and provenance there, as JSON.")] = None,
    yaml: Annotated[
        Path | None, typer.Option(help="Write unfrozen_parameters there, as axolotl and Spectrum take it.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw κ with the selection ringed (.png, .svg, .pdf).", callback=checked_picture),
    ] = None,
) -> None:
    """Choose the units that may learn."""
    from condft.cli.exports import write_selection, write_unfrozen_parameters
    from condft.cli.tables import print_selection
    from condft.report import SpectralReport
    from condft.selection.select import select_units, units_of_roles

    with UserErrors():
        found = SpectralReport.load(report)
        selection = select_units(
            found,
            num_tensors=num_tensors,
            trainable_fraction=trainable_fraction,
            max_condition_number=max_condition_number,
            score=score,
            order=order,
            stratify=None if stratify == "none" else stratify,
            seed=seed,
            candidates=units_of_roles(found, CANDIDATE_ROLES.union(include_roles or ())),
        )
        if yaml is not None:  # first: it refuses parts of parameters, and then nothing else is written
            write_unfrozen_parameters(selection, yaml)
        if out is not None:
            write_selection(selection, found, out, order=order)
        if plot is not None:
            from condft.plots import plot_condition_numbers

            plot_condition_numbers(found, plot, selected=selection.names)
        print_selection(selection, found)

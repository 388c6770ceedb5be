"""What κ is on real weights: against the entropy deficit and its bounds, against random matrices, and how stable.

python -m scripts.data.get_models && python -m scripts.data.get_models --only all-minilm-l6-v2
python -m scripts.research.kappa measure                                  # seconds
python -m scripts.data.get_german
python -m scripts.research.kappa stability configs/damage/german.yaml  # resumable; fine-tuning takes most of it
python -m scripts.research.kappa report                                   # tables and figures, from the JSONL alone
"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
FOLDER = Path("docs/results/kappa")
MODELS = [Path("models") / name for name in ("smollm2-135m-instruct", "whisper-tiny.en", "all-minilm-l6-v2")]
_Models = Annotated[list[Path] | None, typer.Option("--model", help="A checkpoint's folder; may be repeated.")]
_Results = Annotated[Path, typer.Option(help="Folder of atlas.jsonl and stability.jsonl.")]


@app.command()
def measure(model: _Models = None, results: _Results = FOLDER) -> None:
    """Measures every weight of the models that are not in atlas.jsonl yet."""
    from scripts.research.kappa.measure import (
        measure_atlas,  # torch and transformers: slow to import, not for the report
    )

    typer.echo(f"{measure_atlas(model or MODELS, results / 'atlas.jsonl')} weights measured")


@app.command()
def stability(
    config: Annotated[Path, typer.Argument(help="A YAML of configs/study/ with a text section: the fine-tuning.")],
    model: _Models = None,
    results: _Results = FOLDER,
    fine_tuning: Annotated[bool, typer.Option(help="Also fine-tune the YAML's language model.")] = True,
) -> None:
    """Changes all layer weights a little (storage formats, noise, fine-tuning) and measures them again."""
    from scripts.research.config import load_study
    from scripts.research.kappa.measure import Stability, fine_tune

    path, study = results / "stability.jsonl", load_study(config)
    for folder in model or MODELS:
        Stability(folder, path).measure_variants()
    if fine_tuning:
        fine_tune(Stability(Path(study.language_model), path), study, study.arms["full_fine_tuning"].rates)


@app.command()
def report(results: _Results = FOLDER) -> None:
    """Writes kappa.md and its figures next to the JSONL."""
    from scripts.research.kappa.report import write_report

    for path in write_report(results):
        typer.echo(path)


if __name__ == "__main__":
    app()

"""The note in an adapter's folder for readers whose PEFT does not know CondFT, and says only `KeyError: 'CONDFT'`."""

from pathlib import Path

from huggingface_hub import ModelCard

__all__ = ["NOTE", "add_note"]

NOTE = (
    "CondFT adapter: PEFT knows this method once the package condft is imported, and says KeyError: 'CONDFT' without. "
    "Write `import condft` first, or load base and adapter by `condft.load(this_folder)`."
)
_TAG = "condft"
_HEADING = "> **This is a CondFT adapter: `import condft` before PEFT loads it.**"
_NOTE_IN_CARD = f"""{_HEADING}
> Without that import PEFT does not know the method and stops with `KeyError: 'CONDFT'`.
>
> ```python
> import condft
>
> model = condft.load("path or hub id of this adapter")  # base model and adapter
> # or PeftModel.from_pretrained(base_model, "path or hub id of this adapter"), as for any other adapter
> ```
"""


def add_note(folder: str | Path) -> None:
    """Puts the note at the top of the folder's model card; makes a card if there are weights without one.

    Calling it again changes nothing. A folder with neither a card nor weights stays as it is.

    Args:
        folder: The adapter's folder.
    """
    path = Path(folder) / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    # A config that is saved alone gets no card: without weights there is no adapter to load.
    elif (path.parent / "adapter_model.safetensors").exists():
        card = ModelCard(f"---\nlibrary_name: peft\ntags:\n- {_TAG}\n---\n")
    else:
        return
    card.data.tags = sorted({*(card.data.tags or []), _TAG})
    if _HEADING not in card.text:  # so that a second call changes nothing
        card.text = f"\n{_NOTE_IN_CARD}\n{card.text.lstrip()}"
    card.save(path)

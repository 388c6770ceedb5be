"""Downloads from the Hugging Face Hub: its errors become one, which says what was looked for and the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hub_errors"]


@contextmanager
def hub_errors(subject: str, *, wanted: str = "as a hub id it", way_out: str = "") -> Iterator[None]:
    """Around a download: what the hub raises becomes a `FileNotFoundError`.

    The name that a user gave may be meant as a local path as well as a hub id, so the message says both.

    Args:
        subject: What was given and is no local file, such as `runs/base is no checkpoint folder`.
        wanted: What was looked for on the hub.
        way_out: A sentence that ends the message.

    Raises:
        FileNotFoundError: The name is no hub id, there is no such repository or file, or the hub cannot be reached.

    >>> from huggingface_hub import hf_hub_download
    >>> with hub_errors("runs/a/b is no checkpoint folder"):
    ...     hf_hub_download("runs/a/b", "config.json")
    Traceback (most recent call last):
        ...
    FileNotFoundError: runs/a/b is no checkpoint folder, and no hub id either: Repo id must be ...
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise FileNotFoundError(f"{subject}, and no hub id either: {error}") from error
    # No such repository or file and no access are HTTP errors; without a network the entry is not in the local cache,
    # or the connection itself fails.
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        end = f" {way_out}" if way_out else ""
        raise FileNotFoundError(f"{subject}, and {wanted} cannot be had: {error}{end}") from error

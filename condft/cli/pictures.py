"""Paths of pictures are checked as the command line is read: a long analysis must not end with a refusal."""

from pathlib import Path

from condft.cli.errors import UserErrors

__all__ = ["checked_picture"]


def checked_picture(path: Path | None) -> Path | None:
    """Callback of options and arguments that name a picture to draw."""
    if path is not None:
        from condft.plots import check_picture_path

        with UserErrors():
            check_picture_path(path)
    return path

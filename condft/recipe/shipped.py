"""The configurations that come with condft: in an installed wheel inside the package, in a checkout at its top."""

from importlib.util import find_spec
from pathlib import Path

import condft

__all__ = ["find_config", "shipped_configs"]


def shipped_configs() -> list[str]:
    """File names of the shipped run configurations.

    Example:
        >>> shipped_configs()
        ['quickstart.yaml', 'quickstart_across_types.yaml']
    """
    return sorted(path.name for path in _folder().glob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The path of a configuration: a file of that path, else the shipped one of that name.

    Args:
        name: A path, or a name such as `quickstart.yaml` or `quickstart`.

    Raises:
        FileNotFoundError: Neither; lists the shipped names.

    Example:
        >>> find_config("quickstart").name
        'quickstart.yaml'
    """
    if Path(name).is_file():
        return Path(name)
    names = shipped_configs()
    for candidate in (str(name), f"{name}.yaml"):
        if candidate in names:
            return _folder() / candidate
    raise FileNotFoundError(f"{name} is no file and no shipped configuration; shipped are {', '.join(names)}")


def _folder() -> Path:
    # The wheel has the folder configs/ as condft/configs (pyproject.toml), a package with or without __init__.py.
    # A checkout has no such package; there the folder is next to condft/.
    spec = find_spec("condft.configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(condft.__file__).parents[1] / "configs"

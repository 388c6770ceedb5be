"""Runs an action when another package is imported, without importing it. Standard library only."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["when_imported"]


def when_imported(package: str, action: Callable[[], None]) -> None:
    """Calls `action` as soon as `package` has been imported: now if it is already, else right after its import.

    Args:
        package: Name of a top-level package.
        action: Called once. It may import the package's submodules. An error of it becomes an error of the import.

    >>> when_imported("json", lambda: print("json is here"))
    json is here
    """
    if sys.modules.get(package) is not None:
        importlib.import_module(package)  # waits if another thread is importing it just now
        action()
    else:
        sys.meta_path.insert(0, _Finder(package, action))  # first, or the package's finder would answer before it


class _Finder(MetaPathFinder):
    """Finds one package as the other finders do, with a loader that runs the action after the package's own code.

    `importlib.util.find_spec` finds without importing, so this finder stays until an import has succeeded.
    """

    def __init__(self, package: str, action: Callable[[], None]) -> None:
        self._package = package
        self._action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._package:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:  # a namespace package has no code to act after
                    spec.loader = _Loader(spec.loader, self._finish)
                return spec
        return None

    def _finish(self) -> None:
        # Before the removal: if the action fails, so does the import, and the next try needs this finder again.
        self._action()
        if self in sys.meta_path:  # the action may have imported the package again
            sys.meta_path.remove(self)


class _Loader(Loader):
    """Wraps a package's loader until the package is executed, as `importlib.util.LazyLoader` does."""

    def __init__(self, loader: Loader, finish: Callable[[], None]) -> None:
        self._loader = loader
        self._finish = finish

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # for code that uses the spec before the import: resources, source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Before the package's code runs: it must find its real loader, not this wrapper.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finish()

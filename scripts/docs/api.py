"""The API pages: one for each package that exports names, filled by mkdocstrings from the docstrings."""

import importlib
import inspect
import pkgutil

import condft
from scripts.docs.examples import fenced
from scripts.docs.markdown import GENERATED, first_sentence, table

__all__ = ["api_pages", "exports"]

# The command line has a page of its own, made of its signatures.
_LEFT_OUT = ("condft.cli",)

_START = """Every name that a package of condft exports.

The examples in the docstrings run in the tests. They start in an empty folder with these names:

- `base`: a tiny Llama with random weights, a `transformers.LlamaForCausalLM`.
- `tokenizer`: a tokenizer for it.
- `token_ids`: a batch of token ids, shape `(2, 9)`, dtype int64.
- `report`: `condft.analyze(base)`, a `SpectralReport`.

`import condft` imports nothing heavy. Each name of `condft` loads what it needs when it is first used."""


def exports() -> dict[str, list[str]]:
    """Package -> the names in its `__all__`, for condft and every package below it that exports any."""
    walked = pkgutil.walk_packages(condft.__path__, "condft.")
    found = sorted(info.name for info in walked if info.ispkg and info.name not in _LEFT_OUT)
    packages = {name: importlib.import_module(name) for name in ["condft", *found]}
    return {name: sorted(module.__all__) for name, module in packages.items() if getattr(module, "__all__", None)}


def api_pages() -> dict[str, str]:
    """The overview and the pages of the packages, by their path below docs/reference."""
    exported = exports()
    return {"api.md": _overview(exported), **{_path(name): _page(name, exported) for name in exported}}


def _path(package: str) -> str:
    return f"api/{package}.md"


def _overview(exported: dict[str, list[str]]) -> str:
    parts = ["# API", GENERATED, _START]
    for package, names in exported.items():
        module = importlib.import_module(package)
        rows = [[_link(package, name, exported), _summary(module, name)] for name in names]
        parts.append(f"## [`{package}`]({_path(package)})\n\n{first_sentence(module.__doc__)}")
        parts.append(table(["name", "what it is"], rows))
    return "\n\n".join(parts) + "\n"


def _page(package: str, exported: dict[str, list[str]]) -> str:
    module = importlib.import_module(package)
    intro = (
        f"{fenced(inspect.getdoc(module) or '')}\n\nThe examples start from the names in the [overview](../api.md)."
    )
    here = [name for name in exported[package] if _page_of(package, name, exported) == package]
    blocks = [f"::: {_home(package, name)}.{name}" for name in here]
    elsewhere = [_link(package, name, exported, up="../") for name in exported[package] if name not in here]
    if elsewhere:
        blocks.insert(0, f"On the page of another package: {', '.join(elsewhere)}.")
    return "\n\n".join([f"# {package}", GENERATED, intro, *blocks]) + "\n"


def _link(package: str, name: str, exported: dict[str, list[str]], *, up: str = "") -> str:
    page = _page_of(package, name, exported)
    return f"[`{name}`]({up}{_path(page)}#{_home(package, name)}.{name})"


def _page_of(package: str, name: str, exported: dict[str, list[str]]) -> str:
    """The first package that exports this very thing: two descriptions of one name would have one anchor."""
    home = _home(package, name)
    return next(other for other in exported if name in exported[other] and _home(other, name) == home)


def _summary(module: object, name: str) -> str:
    return first_sentence(inspect.getdoc(getattr(module, name)))


def _home(package: str, name: str) -> str:
    """The module that defines the name; an alias of types has none, and is found by its package."""
    value = getattr(importlib.import_module(package), name)
    home = getattr(value, "__module__", None) or ""
    return home if home.startswith("condft") else package

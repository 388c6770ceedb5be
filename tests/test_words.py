"""Plain words: the phrases of a dialect that the project had once do not come back, and one word is for one thing."""

import re
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

PHRASES = (
    r"tell|tells|told|telling",
    r"stand|stands|stood",
    r"beside",
    r"whoever|whatever|however that comes",
    r"in the place of",
    r"of one mind",
    r"last word",
    r"without a word",
    r"worth their while",
    r"now and then",
    r"rehears\w*",
    r"own[ _-]text\w*|own_tokens",
    r"self[ _-]generated\w*",
    r"heard|unheard\w*",
    r"voices?",
    r"turn and turn about",
    r"let in",
    r"\w*(?:quantis|normalis|initialis|factoris|analys(?=e[drs]?\b|ing)|parametris|standardis)\w*",
    r"colours?|behaviours?|neighbours?|labelled|catalogues?|modelling",
)
DIALECT = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b", re.IGNORECASE)
# Names of other libraries, and keys of records that were committed under these names.
FOREIGN = re.compile(
    r"\"(?:self_generated_\w+|own_tokens|quantised)\"|\.tell\(\)|SetVoiceByName|espeak_VOICE|--voices?\b|voice_id"
)
RECORD = ("docs", "results", "config.yaml")
SUFFIXES = (".py", ".md", ".sh", ".yaml", ".toml")


def sources() -> list[Path]:
    """What people read: the package, the scripts, their configurations, and the documentation."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    for folder in ("condft", "scripts", "configs", "docs"):
        found += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    # A run's config.yaml is a record of that run, under the names of its day.
    return [path for path in found if path.exists() and path.parts[-4:-2] + path.parts[-1:] != RECORD]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_plain(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{at}: {line.strip()}" for at, line in enumerate(lines, 1) if DIALECT.search(FOREIGN.sub("", line))]
    assert found == []

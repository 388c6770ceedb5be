"""Tied weights: trained as one, or refused with the way out; never one of the two alone.

A copy of one of two tied weights would silently untie them. The output head would learn while the embedding stays.
And a merged checkpoint whose config says "tied" would lose one of the two when it is loaded. So no unit is a tied
weight, under either of its names. `modules_to_save` with `ensure_weight_tying=True` trains one copy for both (PEFT's
own way), and `trainable_token_indices` does so for some rows.
"""

from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass

from torch import nn

from condft.tuner.choosing.saved_modules import named_around
from condft.weights.names import canonical_name
from condft.weights.walk import iter_modules

__all__ = ["Tie", "refuse_tied_modules", "refuse_tied_units", "ties_of"]


@dataclass(frozen=True)
class Tie:
    """One tensor under two parameter names.

    Attributes:
        first: The parameter's first name, in the order of `named_modules`.
        second: The other name.
        same_place: Whether both names lead to the same attribute of the same module, because the model holds one of
            the modules around it twice. A wrapper that is put there is found under both names, so nothing is untied.
    """

    first: str
    second: str
    same_place: bool = False

    @property
    def modules(self) -> tuple[str, str]:
        """Paths of the two modules."""
        return self.first.rpartition(".")[0], self.second.rpartition(".")[0]


def ties_of(model: nn.Module) -> list[Tie]:
    """Every weight that has more than one name, in the model's order. Parameters that adapters add are left out."""
    seen: dict[int, str] = {}
    ties = []
    # With duplicates, since a module that the model has twice has two names.
    modules = dict(model.named_modules(remove_duplicate=False))
    places: set[tuple[int, str]] = set()
    for path, module, inside_adapter in iter_modules(model):
        parent, _, name = path.rpartition(".")
        place = id(modules[parent]), name
        same_place = place in places
        places.add(place)
        for key, parameter in () if inside_adapter else module.named_parameters(recurse=False):
            # By id: the names of tied weights lead to one and the same Parameter object.
            first = seen.setdefault(id(parameter), f"{path}.{key}")
            if first != f"{path}.{key}":
                ties.append(Tie(canonical_name(first), canonical_name(f"{path}.{key}"), same_place))
    return ties


def refuse_tied_units(parameters: Collection[str], ties: Iterable[Tie]) -> None:
    """Refuses parameters that are tied to another one, unless both names lead to the same place.

    Args:
        parameters: Names of the parameters to train.
        ties: Those of the model.

    Raises:
        ValueError: Names the two and the way out.
    """
    for tie in ties:
        for name, partner in ((tie.first, tie.second), (tie.second, tie.first)):
            if name in parameters and not tie.same_place:  # in one place, one wrapper serves both names
                path = name.rpartition(".")[0]
                raise ValueError(
                    f"{name} is tied to {partner}: training a copy of it would untie the two. Leave it out of "
                    "target_modules, include_roles and target_units; or train the two as one, with "
                    f"modules_to_save={[path]!r} and ensure_weight_tying=True; or load the model with "
                    "tie_word_embeddings=False."
                )


def refuse_tied_modules(modules_to_save: Iterable[str], ties: Iterable[Tie], tied_by_peft: Set[str]) -> None:
    """Refuses modules that would be copied without the module that they share a weight with.

    Args:
        modules_to_save: As in the config: names or suffixes.
        ties: Those of the model.
        tied_by_peft: Paths of modules whose copies PEFT will tie to the copy of the input embedding.

    Raises:
        ValueError: Names the two and the way out.
    """
    names = tuple(modules_to_save)
    for tie in ties:
        if tied_by_peft.isdisjoint(tie.modules):  # else PEFT trains one copy for both
            for path, partner in (tie.modules, tie.modules[::-1]):
                for outer in named_around(path, names):
                    if partner.startswith(f"{outer}."):
                        continue  # one copy holds both
                    raise ValueError(
                        f"{outer} of modules_to_save is tied to {partner}: a copy of it would untie the two. Set "
                        "ensure_weight_tying=True to train one copy for both (of input and output embeddings, named "
                        "as embed_tokens or lm_head), or load the model with tie_word_embeddings=False."
                    )

"""`CondFTConfig`: what to train, in the words of PEFT's other configs."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft.config import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from condft.files.hub import hub_errors
from condft.report import Role, SpectralReport
from condft.selection.select import check_budget_and_rule
from condft.tuner.layers.base import Parts
from condft.tuner.model_card import NOTE, add_note
from condft.tuner.registration import peft_type
from condft.weights.walk import Granularity

__all__ = ["CondFTConfig"]

_HUB_FILE = "spectral_report.json"
_BUDGETS = ("num_tensors", "trainable_fraction", "max_condition_number")
_RULE = (*_BUDGETS, "score", "order", "stratify", "seed")  # what decides which units are selected
_BIASES = ("none", "selected")


@dataclass
class CondFTConfig(PeftConfig):
    """Configuration of CondFT: train the weights of low condition number, full rank, and freeze the rest.

    Without `target_units` the model's weights are analyzed inside `get_peft_model` and the selection is written
    into `target_units`, so that a saved adapter never analyses again. Under torch.distributed all ranks must then call
    `get_peft_model`: they share the work, ranks that hold only meta tensors too, and the first one's choice is
    everybody's.

    Args:
        target_modules: Modules whose weights may be chosen, in PEFT's matching: a list of names or suffixes, a
            regular expression, `"all-linear"`, or None for every supported layer.
        exclude_modules: Modules whose weights may not be chosen, in the same matching.
        modules_to_save: Modules trained and saved whole beside the selection, such as a projector.
        layers_to_transform: Only these layer indices (not with a regular expression as `target_modules`).
        layers_pattern: Name of the list that the indices of `layers_to_transform` count.
        num_tensors: Budget: that many weights. Without any budget, 100 (the paper's).
        trainable_fraction: Budget: at most this fraction of the parameters that may be chosen.
        max_condition_number: Budget: every weight whose condition number is at most this.
        score: What ranks: "condition_number" (the paper's), "relative_condition_number" (against a random matrix
            of the same shape), "entropy_deficit", "stable_rank" or "log_volume" (`condft.selection.scores`). Or
            "fisher_information", which the weights alone do not tell: backward passes over text that the model itself
            writes, see `condft.add_fisher_information`.
        order: "lowest" (the method), or the controls "highest" and "random".
        stratify: "module_type" ranks within q, k, v, ... and shares the budget between them; None ranks across.
        seed: Of the random order.
        granularity: "tensor" chooses among whole weights and single experts of fused stacks; "head" also cuts the
            attention weights into heads (see `condft.weights.heads`) and chooses among those.
        bias: "none" freezes every bias; "selected" trains those of the chosen units too, as copies: of a head's rows
            those entries, of an expert its own.
        include_roles: Units that are analyzed but no candidates unless named here: "embedding", "output_head",
            "router". A list of `target_modules` that names such a module includes it too.
        report: A `SpectralReport`, the path of one, or a hub id whose repository holds `spectral_report.json`, to
            select from instead of analyzing. It must be of the very same weights. Not saved.
        target_units: The resolved selection: full parameter names in the base model, with `[17]` appended for one
            expert of a fused stack and `[h3]`, `[q3]`, `[k3]`, `[v3]` for one head. Given by hand, it is used as
            it is.
        report_fingerprint: Fingerprint of the report that the selection was made from; filled in.
        selected_by: The budget and the rule that `target_units` came from; filled in. Another budget on an existing
            selection is refused.
        base_digests: Digests of the base weights that the adapter replaces; filled in. A base whose weights have
            other values is refused; None accepts any.
        condft_note: For those who read the file without condft.
        init_weights: True starts from the base weights. False perturbs the copies, for tests only.
        trainable_token_indices: As in PEFT's LoRA: token rows of an embedding to train beside the selection.
        ensure_weight_tying: As in PEFT's LoRA: `modules_to_save` that hold tied embeddings are trained as one copy.
            Without it they are refused.
        offload_base: Keep the originals of whole selected weights on the CPU while their copies act: nothing reads
            them then, and on an accelerator they would cost the memory of a second copy. They are brought back where
            they act: for `disable_adapter`, another active adapter, `unload`. Each time costs a transfer. Originals of
            weights that train in part (experts, heads) act, and quantized ones are small: both stay. On a model that
            is on the CPU it changes nothing. `model.device` says "cpu" if the model's first parameter is parked.

    Raises:
        ValueError: An unknown choice, a budget that is no number or out of range, or options that exclude each other.
    """

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Modules whose weights may be chosen: names or suffixes, a regex, 'all-linear', or None."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules whose weights may not be chosen: names or suffixes, or a regex."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the selection."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only these layer indices; not with a pattern as target_modules."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts."}
    )
    num_tensors: int | None = field(
        default=None, metadata={"help": "Budget: number of weights. 100 if no budget is given."}
    )
    trainable_fraction: float | None = field(
        default=None, metadata={"help": "Budget: fraction in (0, 1] of the parameters that may be chosen."}
    )
    max_condition_number: float | None = field(
        default=None, metadata={"help": "Budget: every weight whose condition number is at most this."}
    )
    score: str = field(
        default="condition_number",
        metadata={
            "help": "What ranks: 'condition_number', 'relative_condition_number', 'entropy_deficit', 'stable_rank', "
            "'log_volume' or 'fisher_information'."
        },
    )
    order: str = field(default="lowest", metadata={"help": "'lowest' (the method), 'highest' or 'random'."})
    stratify: str | None = field(
        default="module_type", metadata={"help": "'module_type' ranks within each type, None across all."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the random order."})
    granularity: str = field(
        default="tensor", metadata={"help": "'tensor', or 'head' to choose among single attention heads."}
    )
    bias: str = field(
        default="none", metadata={"help": "'none', or 'selected' to train the biases of the chosen units too."}
    )
    include_roles: list[str] | None = field(
        default=None, metadata={"help": "Roles to make candidates too: 'embedding', 'output_head', 'router'."}
    )
    report: Any = field(
        default=None, metadata={"help": "SpectralReport, its path or hub id, to select from instead of analyzing."}
    )
    target_units: list[str] | None = field(
        default=None, metadata={"help": "The resolved selection: full parameter names in the base model."}
    )
    report_fingerprint: str | None = field(
        default=None, metadata={"help": "Fingerprint of the report that the selection was made from."}
    )
    selected_by: dict[str, Any] | None = field(
        default=None, metadata={"help": "The budget and the rule that target_units came from; filled in."}
    )
    base_digests: dict[str, str] | None = field(
        default=None,
        metadata={"help": "Digests of the base weights that the adapter replaces; None accepts any base."},
    )
    condft_note: str = field(default=NOTE, metadata={"help": "For those who read the file without condft."})
    init_weights: bool = field(
        default=True, metadata={"help": "False perturbs the copies instead of starting from the base; for tests."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token rows of an embedding to train beside the selection."}
    )
    ensure_weight_tying: bool = field(
        default=False, metadata={"help": "Train tied embeddings among modules_to_save as one copy."}
    )
    offload_base: bool = field(
        default=False,
        metadata={"help": "Keep the originals of whole selected weights on the CPU while their copies act."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        if self.selected_by is None:  # else it has chosen already, maybe by a score of a later version
            check_budget_and_rule(**{name: value for name, value in self.rule.items() if name != "seed"})
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if given and self.target_units is not None and self.selected_by is None:
            raise ValueError(
                f"target_units names what trains, so {given[0]}={getattr(self, given[0])} could not act: give one of "
                "them, not both"
            )
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND
        if self.layers_to_transform is not None and is_pattern:
            raise ValueError(
                f"layers_to_transform cannot narrow the pattern target_modules={self.target_modules!r}: give a list "
                "of module names, 'all-linear', None for every layer, or a pattern with the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern counts nothing without layers_to_transform: give the indices too")
        for name, choices in (("granularity", get_args(Granularity)), ("bias", _BIASES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(choices)}")
        allowed = [role.value for role in (Role.EMBEDDING, Role.OUTPUT_HEAD, Role.ROUTER)]
        unknown = sorted(set(self.include_roles or []) - set(allowed))
        if unknown:
            raise ValueError(f"include_roles={unknown} is unknown: choose among {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, without the report: the selection made from it is in `target_units`."""
        return dataclasses.asdict(dataclasses.replace(self, report=None))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; and the model card beside it says first of all that loading takes `import condft`."""
        super().save_pretrained(save_directory, **kwargs)
        add_note(save_directory)

    @property
    def rule(self) -> dict[str, Any]:
        """The budget and the rule as they are now, to compare with those that made the selection."""
        return {name: getattr(self, name) for name in _RULE}

    @property
    def ranks_by_fisher_information(self) -> bool:
        """Whether the selection looks at Fisher information, which no analysis of weights brings."""
        return self.score == "fisher_information" and self.order != "random" and self.target_units is None

    def check_rule(self) -> None:
        """Refuses a budget or a rule that was changed after the selection had been made: it would not act.

        Raises:
            ValueError: Names what was changed.
        """
        before = self.selected_by or {}
        changed = [name for name, value in self.rule.items() if name in before and before[name] != value]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name} was {before[name]!r} when the {len(self.target_units or ())} units of this adapter were "
                f"selected, and is {getattr(self, name)!r} now: an adapter keeps its selection. Put it back, or make "
                "a new CondFTConfig (or set target_units=None) to select again."
            )

    @property
    def plan(self) -> dict[str, Parts]:
        """What `target_units` are in the model that was prepared last: module path -> what of it trains. Not saved."""
        plan: dict[str, Parts] = self.__dict__.get("_plan", {})
        return plan

    @plan.setter
    def plan(self, value: dict[str, Parts]) -> None:
        self.__dict__["_plan"] = value

    @property
    def is_filled_in(self) -> bool:
        """Whether this object got its selection or its digests from a model, not from a file. Not saved."""
        return self.__dict__.get("_is_filled_in", False)

    @is_filled_in.setter
    def is_filled_in(self, value: bool) -> None:
        self.__dict__["_is_filled_in"] = value

    def is_target(self, module_name: str) -> bool:
        """Whether the module holds units of the resolved selection; exact names, never suffixes."""
        return module_name in self.plan

    def load_report(self) -> SpectralReport | None:
        """The report handed over, read from its file or fetched from the hub.

        Raises:
            FileNotFoundError: No such file, and no such report to be had from the hub either.
            ValueError: The file is no report of this version.
        """
        if self.report is None or isinstance(self.report, SpectralReport):
            return self.report
        path = Path(self.report)
        if path.is_dir():
            path = path / _HUB_FILE
        return SpectralReport.load(path if path.is_file() else _fetched(str(self.report)))


def _fetched(repository: str) -> str:
    """The path of a hub repository's report, from the hub's cache if it is there."""
    import huggingface_hub

    with hub_errors(
        f"report={repository!r} is no file",
        wanted=f"{_HUB_FILE} of a hub repository of that name",
        way_out="Download the file where there is a network and hand over its path, or leave report out to analyze "
        "the model here.",
    ):
        return huggingface_hub.hf_hub_download(repository, _HUB_FILE)

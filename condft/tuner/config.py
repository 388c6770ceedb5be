"""`CondFTConfig`: what to train, in the terms of PEFT's other configs."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft.config import PeftConfig
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND

from condft.files.hub import hub_errors
from condft.report import Role, SpectralReport
from condft.selection.select import check_budget_and_rule
from condft.tuner.model_card import NOTE, add_note
from condft.tuner.registration import peft_type
from condft.weights.walk import Granularity

__all__ = ["CondFTConfig"]

_HUB_FILE = "spectral_report.json"
_BUDGETS = ("num_tensors", "trainable_fraction", "max_condition_number")
_RULE = (*_BUDGETS, "score", "order", "stratify", "seed")  # what decides which units are selected
# PEFT's "all" and "lora_only" train the base's own biases in place, and so change the base.
_BIASES = ("none", "selected")


@dataclass
class CondFTConfig(PeftConfig):
    """Which weights to train: those of low condition number. All others stay frozen, bit for bit.

    `get_peft_model` analyzes the weights, selects the units of lowest score within a budget, and writes the selection
    into `target_units`. A saved adapter holds that selection, so loading it analyzes nothing.

    A *unit* is what is scored and trained as one: a weight, one expert of a fused stack (`...down_proj[17]`), or, with
    `granularity="head"`, one attention head (`...q_proj.weight[h3]`).

    Under torch.distributed, all processes must call `get_peft_model`. They share the work, also those that hold only
    meta tensors, and the first process's selection is used on all.

    Half of the parameters of each module type, those of lowest condition number:

    >>> from peft import get_peft_model
    >>> config = CondFTConfig(trainable_fraction=0.5)
    >>> model = get_peft_model(base, config)
    >>> model.print_trainable_parameters()
    trainable params: 18,432 || all params: 58,656 || trainable%: 31.4239
    >>> len(config.target_units), config.selected_by["trainable_fraction"]
    (14, 0.5)

    Three weights among the gate and up projections, and a projector that is trained whole:

    >>> config = CondFTConfig(num_tensors=3, target_modules=["gate_proj", "up_proj"], modules_to_save=["projector"])

    Units by name, without an analysis:

    >>> config = CondFTConfig(target_units=["model.layers.0.mlp.up_proj.weight"])

    Args:
        target_modules: The modules whose weights may be selected, in PEFT's matching: a list of names or suffixes, a
            regular expression, or `"all-linear"`. None means every supported layer.
        exclude_modules: Modules whose weights may not be selected, in the same matching.
        modules_to_save: Modules that are trained whole and saved with the adapter, such as a projector.
        layers_to_transform: Only these layer indices. Not with a regular expression as `target_modules`.
        layers_pattern: The name of the module list that `layers_to_transform` counts.
        num_tensors: Budget: the number of units. If no budget is given, it is 100, as in the paper.
        trainable_fraction: Budget: at most this fraction, in (0, 1], of the parameters that may be selected.
        max_condition_number: Budget: every unit whose condition number is at most this.
        score: What units are ranked by. "condition_number" is the paper's. "relative_condition_number" divides it by
            that of a random matrix of the same shape. "entropy_deficit", "stable_rank" and "log_volume" are other
            measures of the spectrum (see `condft.selection.scores`). "fisher_information" is no property of the
            weights alone: it takes backward passes over text sampled from the model (see `add_fisher_information`).
        order: "lowest" selects the lowest scores: the method. "highest" and "random" are controls for experiments.
        stratify: "module_type" ranks within each type (all `q_proj`, all `k_proj`, ...) and shares the budget between
            the types. None ranks all units together. Scores depend on shape and role, so None tends to select a
            single type.
        seed: The seed of `order="random"`.
        granularity: "tensor" selects whole weights, and single experts of fused stacks. "head" also splits attention
            weights into heads and selects among these (see `condft.weights.heads`).
        bias: "none" freezes every bias. "selected" trains the biases of the selected units too: of a head the entries
            of its rows, of an expert its own.
        include_roles: Roles that may be selected in addition: "embedding", "output_head", "router". A list of
            `target_modules` that names such a module includes it too.
        report: A report to select from, instead of an analysis: a `SpectralReport`, its path, or a hub id whose
            repository holds `spectral_report.json`. It must be of the same weights. It is not saved.
        target_units: The selection: full parameter names in the base model, with `[17]` for one expert of a fused
            stack, and `[h3]`, `[q3]`, `[k3]` or `[v3]` for one head. `get_peft_model` fills it in. If you give it,
            nothing is analyzed, and a budget is refused.
        report_fingerprint: The fingerprint of the report that the selection was made from. Filled in.
        selected_by: The budget and the rule that the selection was made by. Filled in. If you change the budget of a
            config that has a selection, it is refused.
        base_digests: Unit -> dtype and digest of the base weight that the adapter replaces. Filled in. A base with
            other values is refused when the adapter is loaded; None accepts any base.
        condft_note: An explanation for readers of the file whose PEFT does not know CondFT.
        init_weights: True starts from the base weights. False perturbs the copies; that is for tests only.
        trainable_token_indices: As in PEFT's LoRA: rows of an embedding that train too, by token id.
        ensure_weight_tying: As in PEFT's LoRA: tied embeddings among `modules_to_save` are trained as one copy.
            Without it, tied embeddings are refused there.
        offload_base: Keep the originals of wholly selected weights on the CPU while their copies are in use. On an
            accelerator this saves the memory of the originals. They are moved back when they are needed: for
            `disable_adapter`, another active adapter, or `unload`. Each move costs a transfer. The originals of
            weights that train in part (experts, heads) stay, since their frozen part is in use, and so do quantized
            ones, which are small. On the CPU it has no effect. `model.device` is "cpu" if the model's first parameter
            is offloaded.

    Attributes:
        is_filled_in: Whether a model has filled in this object in this process, so that it belongs to that model. It
            is no argument, and it is not saved.

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
        default=None, metadata={"help": "Modules trained and saved whole, in addition to the selection."}
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
            "help": "What units are ranked by: 'condition_number', 'relative_condition_number', 'entropy_deficit', "
            "'stable_rank', 'log_volume' or 'fisher_information'."
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
        default=None, metadata={"help": "Token rows of an embedding to train, in addition to the selection."}
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
        # No field: it says what happened to this object, so it must neither be saved nor be compared nor be copied
        # by `dataclasses.replace`.
        self.is_filled_in = False
        if isinstance(self.target_modules, list):
            self.target_modules = sorted(set(self.target_modules))
        if self.selected_by is None:  # else the selection is made, maybe by a score of a later version of condft
            check_budget_and_rule(**{name: value for name, value in self.rule.items() if name != "seed"})
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        # With `selected_by`, a model has filled in target_units by this very budget.
        if given and self.target_units is not None and self.selected_by is None:
            raise ValueError(
                f"target_units names what trains, so {given[0]}={getattr(self, given[0])} could not act: give one of "
                "them, not both"
            )
        # PEFT (0.21) applies layers_to_transform to lists only: on a pattern it would have no effect.
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
        # Replaced first: asdict would copy all rows of the report.
        return dataclasses.asdict(dataclasses.replace(self, report=None))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's. The model card in the folder then begins with a note that loading takes `import condft`."""
        # PEFT (0.21) writes the config after the card and the weights, so this is where the card can be changed.
        super().save_pretrained(save_directory, **kwargs)
        add_note(save_directory)

    @property
    def rule(self) -> dict[str, Any]:
        """The budget and the rule as they are now, to compare with `selected_by`."""
        return {name: getattr(self, name) for name in _RULE}

    @property
    def ranks_by_fisher_information(self) -> bool:
        """Whether the selection needs Fisher information, which the analysis of the weights does not give."""
        # A random order and given units need no score, so the backward passes are saved.
        return self.score == "fisher_information" and self.order != "random" and self.target_units is None

    def check_rule(self) -> None:
        """Refuses a budget or a rule that was changed after the selection was made: it would have no effect.

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

    def load_report(self) -> SpectralReport | None:
        """The report that was given, read from its file or fetched from the hub; None if none was given.

        Raises:
            FileNotFoundError: No such file, and the hub has no such report either.
            ValueError: The file is no report of this version.
        """
        if self.report is None or isinstance(self.report, SpectralReport):
            return self.report
        path = Path(self.report)
        if path.is_dir():
            path = path / _HUB_FILE
        # A hub id looks like a relative path, so the disk comes first.
        return SpectralReport.load(path if path.is_file() else _fetched(str(self.report)))


def _fetched(repository: str) -> str:
    """The path of a hub repository's report; downloaded unless it is in the hub's cache."""
    import huggingface_hub

    with hub_errors(
        f"report={repository!r} is no file",
        wanted=f"{_HUB_FILE} of a hub repository of that name",
        way_out="Download the file where there is a network and hand over its path, or leave report out to analyze "
        "the model here.",
    ):
        return huggingface_hub.hf_hub_download(repository, _HUB_FILE)

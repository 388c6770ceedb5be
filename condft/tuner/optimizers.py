"""Parameter groups for any torch optimizer, and weight decay towards the base weights instead of zero."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from condft.tuner.layers.base import CondFTLayer
from condft.weights.names import canonical_name

__all__ = ["COMPONENTS", "decay_towards_base", "parameter_groups"]

COMPONENTS = ("selected", "modules_to_save", "token_rows", "other")

_PER = ("component", "unit")
# A key of the optimizer's groups, so that its state_dict saves and restores the strength.
_BASE_DECAY = "decay_towards_base"

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | Mapping[str, float],
    weight_decay: float | Mapping[str, float] = 0.0,
    decay_towards: Literal["zero", "base"] = "zero",
    per: Literal["component", "unit"] = "component",
) -> list[dict[str, Any]]:
    """Puts every trainable parameter into exactly one group, for `torch.optim.AdamW(groups)` or any other optimizer.

    Args:
        model: The model with its adapter. The parameters that require a gradient are grouped.
        lr: Learning rate, or one for each component that the model has, such as
            `{"selected": 2e-5, "modules_to_save": 1e-3}`. The components: "selected" (the weights that CondFT
            chose), "modules_to_save" (a projector), "token_rows" (`trainable_token_indices`) and "other".
        weight_decay: Weight decay, or one for each component. A step decays by `lr * weight_decay`. If it decays
            towards zero, vectors (biases, norms) have none, as in transformers' Trainer.
        decay_towards: "zero", done by the optimizer; or "base": then pass the optimizer to `decay_towards_base`.
        per: One group for each component, or one for each parameter.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and a `name`; a new list at each call, in the model's order.

    Raises:
        ValueError: Nothing is trainable, a choice is unknown, or a mapping lacks a component that the model has.

    >>> import torch
    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, parameter_groups
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=3, modules_to_save=["model.norm"]))
    >>> groups = parameter_groups(model, lr={"selected": 2e-5, "modules_to_save": 1e-3}, weight_decay=0.1)
    >>> [(group["name"], len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
    [('selected', 3, 2e-05, 0.1), ('modules_to_save, vectors', 1, 0.001, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    for option, value, choices in (("decay_towards", decay_towards, ("zero", "base")), ("per", per, _PER)):
        if value not in choices:
            raise ValueError(f"{option}={value!r} is unknown: choose among {', '.join(choices)}")
    groups: dict[str, dict[str, Any]] = {}
    for name, component, parameter in _trainable(model):
        decay = _of(weight_decay, component, "weight_decay")
        # Vectors get a group of their own only where it makes a difference.
        decays = decay_towards == "base" or parameter.ndim > 1 or decay == 0.0
        key = canonical_name(name) if per == "unit" else component if decays else f"{component}, vectors"
        options: dict[str, Any] = {"name": key, "params": [], "lr": _of(lr, component, "lr")}
        options["weight_decay"] = decay if decays and decay_towards == "zero" else 0.0
        if decay_towards == "base":
            options[_BASE_DECAY] = decay
        groups.setdefault(key, options)["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter of the model requires a gradient: load the adapter with is_trainable=True")
    return list(groups.values())


def decay_towards_base(optimizer: AnyOptimizer, model: nn.Module) -> AnyOptimizer:
    r"""Makes the groups of `parameter_groups(..., decay_towards="base")` decay towards the base weights.

    Before each step $w \leftarrow w - \eta \lambda (w - w_0)$. This is AdamW's decoupled decay (Loshchilov & Hutter,
    arXiv 1711.05101) around the base weight $w_0$ (as L2-SP, arXiv 1802.01483, does in the loss). $w_0$ is read from
    the wrapped layer, so no second copy of the base is kept. It works with Trainer's `optimizers=` and accelerate's
    `prepare`. A resumed optimizer needs this call again: an optimizer's state has the groups, but no hooks.

    Args:
        optimizer: Any torch optimizer. Its own `weight_decay` for these groups is 0.
        model: The model whose parameters it updates.

    Returns:
        The same optimizer.

    Raises:
        ValueError: None of the optimizer's groups was made with `decay_towards="base"`.

    >>> import torch
    >>> from peft import get_peft_model
    >>> from condft import CondFTConfig, decay_towards_base, parameter_groups
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=3))
    >>> groups = parameter_groups(model, lr=1e-4, weight_decay=0.1, decay_towards="base")
    >>> optimizer = decay_towards_base(torch.optim.AdamW(groups), model)
    >>> model(input_ids=token_ids, labels=token_ids).loss.backward()
    >>> optimizer.step()
    """
    if not any(_BASE_DECAY in group for group in optimizer.param_groups):
        raise ValueError(
            'no group of the optimizer decays towards the base: make them with parameter_groups(decay_towards="base")'
        )

    def decay(hooked: Optimizer, args: Any, kwargs: Any) -> None:
        # Looked up at each step: FSDP2 replaces the parameters that the optimizer was made with.
        base_of = {id(parameter): base for parameter, base in _base_pairs(model)}
        for group in hooked.param_groups:
            # With the group's present learning rate, as AdamW's own decay: it follows the scheduler.
            strength = group["lr"] * group.get(_BASE_DECAY, 0.0)
            if strength == 0.0:  # as for groups that decay towards zero
                continue
            for parameter in group["params"]:
                # Without a gradient there is no step: torch's optimizers do not decay such a parameter either.
                if parameter.grad is not None and id(parameter) in base_of:
                    # The base may have half precision, or be offloaded to the CPU.
                    base = base_of[id(parameter)].to(parameter)
                    # lerp_ is the formula: w + strength * (w0 - w).
                    # `.data`, since gradients are recorded in this hook, other than in the step.
                    parameter.data.lerp_(base, float(strength))

    # Before the step, as AdamW decays before it adds its update.
    optimizer.register_step_pre_hook(decay)
    return optimizer


def _trainable(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Name, component and parameter of everything that requires a gradient."""
    component_of: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, CondFTLayer):
            component_of.update(
                (id(p), "selected") for n in module.adapter_layer_names for p in getattr(module, n).values()
            )
        elif isinstance(module, ModulesToSaveWrapper):
            component_of.update((id(p), "modules_to_save") for p in module.modules_to_save.parameters())
        elif isinstance(module, TrainableTokensWrapper):
            component_of.update((id(p), "token_rows") for p in module.token_adapter.trainable_tokens_delta.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, component_of.get(id(parameter), "other"), parameter


def _base_pairs(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Pairs of a trained parameter and the base values that it started from."""
    for module in model.modules():
        if isinstance(module, CondFTLayer):
            for key, by_adapter in module.slices.items():
                for adapter, slices in by_adapter.items():
                    base = module.base_values(key)
                    yield module.copies_of(key)[adapter], base if slices is None else slices.take(base)
        elif isinstance(module, ModulesToSaveWrapper):
            originals = dict(module.original_module.named_parameters())
            for saved in module.modules_to_save.values():
                yield from ((parameter, originals[key].detach()) for key, parameter in saved.named_parameters())
        elif isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter
            yield from ((p, rows.trainable_tokens_original[name]) for name, p in rows.trainable_tokens_delta.items())


def _of(value: float | Mapping[str, float], component: str, option: str) -> float:
    if not isinstance(value, Mapping):
        return value
    unknown = sorted(set(value) - set(COMPONENTS))
    if unknown or component not in value:
        problem = f"names {unknown[0]!r}, which is no component" if unknown else f"lacks {component!r}"
        raise ValueError(f"{option}={dict(value)} {problem}: the components are {', '.join(COMPONENTS)}")
    return value[component]

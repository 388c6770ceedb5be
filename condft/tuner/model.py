"""`CondFTModel`: the BaseTuner that selects, wraps the selected layers, and checks what is loaded.

Most methods here override one of PEFT's `BaseTuner` (0.21). Each says what PEFT's own does and why that is not enough.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

from peft.config import PeftConfig
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from condft.tuner.choosing.candidates import matches
from condft.tuner.choosing.resolve import Resolution, given_resolution, resolve
from condft.tuner.choosing.saved_modules import refuse_saved_units
from condft.tuner.choosing.tied import refuse_tied_modules, refuse_tied_units, ties_of
from condft.tuner.config import CondFTConfig
from condft.tuner.layers.base import CondFTLayer, Parts
from condft.tuner.layers.dequantize import exempt_from_quantization, is_quantized, working_dtype
from condft.tuner.layers.mixed_batch import pass_adapter_names
from condft.tuner.layers.sharded import refuse_partitions
from condft.tuner.loading.adapter_file import check_adapter_file
from condft.tuner.loading.base_digests import check_base, units_of_another_base
from condft.tuner.patches.encoder_fast_path import disable_encoder_fast_path
from condft.tuner.patches.meta_parameters import materialize
from condft.tuner.registration import PREFIX
from condft.tuner.targets import Targets, layer_class, parameter_of
from condft.weights.walk import canonical_name

__all__ = ["CondFTModel"]


class CondFTModel(BaseTuner):
    """Trains full-rank copies of the weights of low condition number; everything else stays frozen.

    Made by `peft.get_peft_model(model, CondFTConfig(...))`. See `CondFTConfig` for what is chosen. An adapter that is
    added with the config object of another one, `model.add_adapter("ref", model.peft_config["default"])`, starts with
    that one's current values.

    Attributes:
        model: The base model, with the selected layers wrapped.
        peft_config: Adapter name -> `CondFTConfig`.

    >>> from peft import get_peft_model
    >>> model = get_peft_model(base, CondFTConfig(num_tensors=2, target_modules=["v_proj"]))
    >>> type(model.base_model).__name__
    'CondFTModel'
    >>> for name, parameter in model.named_parameters():
    ...     if parameter.requires_grad:
    ...         print(name, tuple(parameter.shape))
    base_model.model.model.layers...self_attn.v_proj.condft_weight.default (16, 32)
    base_model.model.model.layers...self_attn.v_proj.condft_weight.default (16, 32)
    >>> with model.disable_adapter():
    ...     logits_of_the_base = model(token_ids).logits
    >>> merged = model.merge_and_unload()  # a plain Llama with the trained values
    """

    prefix: str = PREFIX
    tuner_layer_cls = CondFTLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's name; targets come from the weights)

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **options: Any) -> None:
        _refuse_second(model, adapter_name)  # first, since PEFT's own begins by changing the model's peft_config
        # Adapter name -> what of each module trains. Set before PEFT's own, which injects the first adapter.
        self._plans: dict[str, dict[str, Parts]] = {}
        super().__init__(model, peft_config, adapter_name, **options)
        # PeftModel hands over a dict of configs, and casts afterwards unless autocast_adapter_dtype=False. But
        # inject_adapter_in_model, which transformers' add_adapter calls, hands over one config and never casts
        # (PEFT 0.21). Copies of a half-precision base would stay in half precision and lose most small steps.
        if isinstance(peft_config, PeftConfig):
            self._cast_adapter_dtype(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """PEFT's own replaces parameters by new ones, which all require gradients; here frozen ones stay frozen."""
        frozen = [name for name, parameter in self.model.named_parameters() if not parameter.requires_grad]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name in frozen:
            self.model.get_parameter(name).requires_grad_(False)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of the parameters that DistributedDataParallel must leave out: those that `offload_base` moved away.

        It takes parameters of one device only. The names are given twice: as seen from here, and from the `PeftModel`
        around it, since DDP asks the module that it wraps.
        """
        own = [f"model.{name}" for name in getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())]
        away = {
            id(p)
            for module in self.modules()
            if isinstance(module, CondFTLayer)
            for p in module.offloaded_parameters()
        }
        own += [name for name, parameter in self.named_parameters() if id(parameter) in away]
        return own + [f"base_model.{name}" for name in own]

    def _prepare_adapter_config(self, peft_config: CondFTConfig, model_config: dict) -> CondFTConfig:
        return peft_config  # PEFT's own looks target_modules up by architecture; here the weights decide

    def _check_new_adapter_config(self, config: CondFTConfig) -> None:
        """PEFT's own allows one adapter with a bias, the base's; here each has its own copy of it."""

    def _prepare_model(self, peft_config: CondFTConfig, model: nn.Module) -> None:
        """Decides what trains and writes it into the config. PEFT calls this before every injection."""
        refuse_partitions(model)  # first: a ZeRO-3 partition has no values, so all that follows would fail
        targets = Targets(model)
        resolution: Resolution | None
        if peft_config.target_units is None:
            resolution = resolve(peft_config, model, targets)
            units = resolution.target_units
        else:
            peft_config.check_rule()  # a changed budget would have no effect
            units = tuple(peft_config.target_units)
            if not units:
                raise ValueError("target_units=[] trains nothing: name units, or leave it None to select by a budget")
            _check_targets_exist(peft_config, model, targets)  # before `plan`, whose error knows no near names
            resolution = None
        # In this order: what cannot train at all is refused as such, before an error could advise how to untie it.
        plan = targets.plan(units, bias=peft_config.bias == "selected")
        refuse_saved_units(model, plan, peft_config.modules_to_save or ())
        self._refuse_ties(peft_config, model, units)
        # Last, since it hashes the weights: the checks before it read names only.
        if resolution is None:
            resolution = _check_or_resolve_given(peft_config, targets)
        if resolution is not None:
            _fill_in(peft_config, resolution)
        # PEFT hands over the config without the adapter's name, and adapters may share one config object.
        self._plans |= {name: plan for name, config in self.peft_config.items() if config is peft_config}

    def _plan_of(self, config: CondFTConfig) -> dict[str, Parts]:
        """Canonical module path -> what of it trains, in the adapter of this very config object."""
        return next(self._plans[name] for name, other in self.peft_config.items() if other is config)

    def _refuse_ties(self, config: CondFTConfig, model: nn.Module, units: Iterable[str]) -> None:
        ties, saved = ties_of(model), config.modules_to_save or []
        refuse_tied_units({parameter_of(unit) for unit in units}, ties)
        tied_by_peft: set[str] = set()
        # PEFT ties the copies of these names only.
        if config.ensure_weight_tying and any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in saved):
            tied_by_peft = set(self._get_module_names_tied_with_embedding())
        refuse_tied_modules(saved, ties, tied_by_peft)

    # A static method in BaseTuner. PEFT 0.21 calls it on the tuner everywhere, and the answer depends on its plans.
    def _check_target_module_exists(  # type: ignore[override]
        self, peft_config: CondFTConfig, key: str
    ) -> Any:
        if canonical_name(key) in self._plan_of(peft_config):
            return True
        # Both results are falsy. PEFT distinguishes "excluded" from "not matched", to warn of useless exclusions.
        matched = matches(peft_config, key)
        return False if matched else matched

    def _create_and_replace(
        self,
        peft_config: CondFTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        options: dict[str, Any] = {
            name: getattr(peft_config, name) for name in ("init_weights", "inference_mode", "offload_base")
        }
        parts = self._plan_of(peft_config).get(canonical_name(current_key))
        if parts is None:  # PEFT follows the state_dict of inject_adapter_in_model where there is one, not the config
            raise _other_state_dict(adapter_name, f"weights of {current_key}, which the adapter does not train")
        if isinstance(target, CondFTLayer):
            target.update_layer(adapter_name, parts, **options)
            return
        layer = layer_class(target)(target, adapter_name, parts, dense_dtype=working_dtype(self.model), **options)
        if adapter_name not in self.active_adapters:  # as in PEFT's methods
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    # Says which modules share the copy that `modules_to_save` makes of the input embedding; nothing in it is LoRA's.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's own, followed by checks and by what it does for LoRA only.

        An adapter that is added with the same config object as another one starts with that one's values. TRL makes
        the reference of a trained policy in this way. It then copies the values itself, but by the names of LoRA's
        parameters only (TRL 1.16).
        """
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        missing = self._plan_of(config).keys() - {
            canonical_name(path) for path, m in model.named_modules() if _has(m, adapter_name)
        }
        if missing:
            raise _other_state_dict(adapter_name, f"no weights of {min(missing)}, which the adapter trains")
        twins = [name for name, other in self.peft_config.items() if other is config and name != adapter_name]
        if twins and config.init_weights:  # else each has its own perturbation
            _copy_adapter(model, twins[0], adapter_name)
        # After PEFT's own, which makes the wrappers, and all copies that need memory (of saved modules too).
        disable_encoder_fast_path(model, CondFTLayer)
        materialize(model)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Replaces the module and nothing else. PEFT's own also copies weight, bias and device to the new one.

        Here they are in place already. And PEFT's own would fail: experts have no `weight`, the weight of an
        embedding with trained token rows is no parameter any more, and an offloaded one is on another device.
        """
        if isinstance(child, CondFTLayer):
            child.update_offloading(unloading=True)
        setattr(parent, child_name, new_module)

    def unload(self) -> nn.Module:
        """As PEFT's. Like there, the weights of a merged adapter stay in the model; here a warning says so."""
        merged = sorted(
            {name for m in self.model.modules() if isinstance(m, CondFTLayer) for name in m.merged_adapters}
        )
        if merged:
            warnings.warn(
                f"the adapters {merged} are merged, so what unload() gives back holds their weights: call "
                "unmerge_adapter() first for the base model as it was",
                stacklevel=2,
            )
        return super().unload()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's own; then the layers that are no longer quantized are listed in the model's quantization config.

        Without that, transformers would read their dense weights as packed ones when it loads a saved checkpoint.
        """
        # Before the wrappers are gone: afterwards nothing says which layers were quantized.
        wrapped = [path for path, m in self.model.named_modules() if isinstance(m, CondFTLayer)]
        quantized = [path for path in wrapped if self.model.get_submodule(path).quantization_backend is not None]
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        # Only a merge makes them dense: after a plain unload they are quantized as before.
        exempt_from_quantization(model, (p for p in quantized if not is_quantized(model.get_submodule(p))))
        return model

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freezes the base. PEFT's own unfreezes biases in place, and it does not know bias="selected"."""
        own = [module for module in model.modules() if isinstance(module, CondFTLayer | AuxiliaryTrainingWrapper)]
        frozen = {id(p) for p in model.parameters()} - {id(p) for module in own for p in _added_parameters(module)}
        for parameter in model.parameters():
            if id(parameter) in frozen:
                parameter.requires_grad = False

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by PEFT around forward and generate: serves `adapter_names`, one a sample."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        known, num_beams = list(self.peft_config), kwargs.get("num_beams") or 1
        with pass_adapter_names(self.model, CondFTLayer, names, known=known, num_beams=num_beams):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's mapping, after a check that the file is this adapter's: PEFT itself would only warn."""
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        check_adapter_file(model, adapter_name, remapped)
        return remapped


def _added_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """What a wrapper adds to the model: all but its base layer. PEFT itself freezes the base of a module to save."""
    if isinstance(module, CondFTLayer):
        for name in module.adapter_layer_names:
            yield from getattr(module, name).values()
    else:
        yield from module.parameters()


def _has(module: nn.Module, adapter_name: str) -> bool:
    return isinstance(module, CondFTLayer) and any(True for _ in module.parts_of(adapter_name))


def _other_state_dict(adapter_name: str, what: str) -> ValueError:
    return ValueError(
        f"the state_dict handed over for {adapter_name!r} has {what}: hand over the config that was saved with it, "
        "or no state_dict, and load it with set_peft_model_state_dict"
    )


def _refuse_second(model: nn.Module, adapter_name: str) -> None:
    """Refuses the name of an adapter that is there: copies of units that are not chosen again would stay in use."""
    count = sum(_has(module, adapter_name) for module in model.modules())
    if count:
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already, in {count} layers, and their copies would stay "
            "next to the new ones. Take it off first, with model.unload() or merge_and_unload(), or give the new "
            "adapter another name: model.add_adapter(name, config)."
        )


def _copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Gives an adapter the values and dtypes of another one of the same parameters."""
    for module in model.modules():
        if isinstance(module, CondFTLayer | AuxiliaryTrainingWrapper):
            parameters = dict(module.named_parameters())
            for name, parameter in parameters.items():
                path = name.split(".")
                if source in path:
                    path[path.index(source)] = target
                    twin = parameters.get(".".join(path))
                    if twin is not None and not twin.is_meta:
                        # `.data`, and not copy_, so that the twin gets the dtype too and stays the same object.
                        twin.data = parameter.detach().clone()


def _fill_in(config: CondFTConfig, resolution: Resolution) -> None:
    """Writes what was resolved into the config: the one place that does so."""
    if config.target_units is None:
        config.report = None  # the selection made from it replaces it
    config.target_units = list(resolution.target_units)
    config.base_digests = dict(resolution.base_digests)
    config.report_fingerprint = resolution.report_fingerprint
    config.selected_by = None if resolution.selected_by is None else dict(resolution.selected_by)
    config.target_modules = resolution.target_modules
    config.is_filled_in = True


def _check_or_resolve_given(config: CondFTConfig, targets: Targets) -> Resolution | None:
    """For a config with `target_units`: checks the base against its digests, or computes these if it has none."""
    if config.base_digests is None:
        return given_resolution(config, targets)
    if config.is_filled_in:
        _refuse_another_model(config, units_of_another_base(targets, config.base_digests))
    else:
        check_base(targets, config.base_digests, config.base_model_name_or_path)
    return None


def _check_targets_exist(config: CondFTConfig, model: nn.Module, targets: Targets) -> None:
    missing = [name for name in config.target_units or () if targets.find(name) is None]
    if config.is_filled_in:
        _refuse_another_model(config, missing)
    if missing:
        parameters = {canonical_name(name) for name, _ in model.named_parameters()}
        near = get_close_matches(parameter_of(missing[0]), parameters, n=1, cutoff=0.0)
        raise ValueError(
            f"{len(missing)} of the adapter's {len(config.target_units or ())} weights do not exist in this base "
            f"model, the first is {missing[0]!r} (nearest: {near[0] if near else 'none'}). "
            f"The adapter was made for {config.base_model_name_or_path or 'another model'}."
        )


def _refuse_another_model(config: CondFTConfig, units: list[str]) -> None:
    """Refuses a config that was filled in on another model. No adapter is loaded here, so the error names none."""
    if units:
        raise ValueError(
            f"this CondFTConfig was filled in on another model already: of its {len(config.target_units or ())} "
            f"target_units {len(units)} have other values here or do not exist, the first is {units[0]!r}. A config "
            "belongs to one model: make a new CondFTConfig for this one, or set target_units=None and "
            "base_digests=None on it to select again."
        )

"""The contestants: one base model with CondFT, with LoRA, or unfrozen by hand, and their training steps.

All train by AdamW (fused, as in the Trainer's default) on the model's own loss: the same batch, the same weights.
"""

import copy
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
)

from condft import CondFTConfig

__all__ = ["FRACTION", "Adapted", "UnfrozenByHand", "batch", "entries_of", "moe", "quarter_of_experts", "smollm2"]

SMOLLM2 = "models/smollm2-135m-instruct"
FRACTION = 0.1  # of the layers' parameters that trains on SmolLM2
RANK = 16
LEARNING_RATE = 1e-5
STACKS = ("gate_up_proj", "down_proj")
_MOE: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def smollm2(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype, use_safetensors=True)


def moe(kind: str, implementation: str, dtype: torch.dtype) -> Any:
    """Two layers of Mixtral's or OLMoE's proportions: 8 wide experts, 2 a token, or 64 narrow ones, 8 a token."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mixtral":
            sizes = {"intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2}
            model: Any = MixtralForCausalLM(MixtralConfig(**_MOE, **sizes))
        else:
            sizes = {"intermediate_size": 256, "num_experts": 64, "num_experts_per_tok": 8}
            model = OlmoeForCausalLM(OlmoeConfig(**_MOE, **sizes))
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def quarter_of_experts(model: Any, seed: int = 0) -> list[str]:
    """Units: in every layer both matrices of a random quarter of the experts."""
    generator = random.Random(seed)
    units = []
    for index, layer in enumerate(model.model.layers):
        count = len(layer.mlp.experts.gate_up_proj)
        for expert in sorted(generator.sample(range(count), count // 4)):
            units += [f"model.layers.{index}.mlp.experts.{stack}[{expert}]" for stack in STACKS]
    return units


def batch(model: Any, tokens: int, *, samples: int = 4) -> Tensor:
    """`(samples, tokens / samples)` seeded random ids."""
    generator = torch.Generator().manual_seed(0)
    # From 3 on: the ids below are special tokens.
    return torch.randint(3, model.config.vocab_size, (samples, tokens // samples), generator=generator)


def entries_of(model: nn.Module, units: Iterable[str]) -> int:
    """How many numbers the units have, by the base model's own shapes."""
    return sum(
        model.get_parameter(name)[experts].numel() if experts else model.get_parameter(name).numel()
        for name, experts in _by_parameter(units).items()
    )


def _by_parameter(units: Iterable[str]) -> dict[str, list[int]]:
    """Parameter name -> the experts of it; none for a whole weight."""
    found: dict[str, list[int]] = defaultdict(list)
    for unit in units:
        name, expert = re.fullmatch(r"([^\[]+)(?:\[(\d+)\])?", unit).groups()  # type: ignore[union-attr]
        found[name] += [] if expert is None else [int(expert)]
    return dict(found)


class Adapted:
    """A model adapted by PEFT, and AdamW over what it trains."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self._optimize([p for p in model.parameters() if p.requires_grad])

    def _optimize(self, trained: list[Any]) -> None:
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)

    @classmethod
    def by_condft(cls, base: nn.Module, units: Sequence[str]) -> "Adapted":
        return cls(get_peft_model(copy.deepcopy(base), CondFTConfig(target_units=list(units))))

    @classmethod
    def by_lora(cls, base: nn.Module) -> "Adapted":
        """On all linear layers."""
        return cls(get_peft_model(copy.deepcopy(base), lora_config()))

    @classmethod
    def by_lora_on_experts(cls, base: nn.Module) -> "Adapted":
        """On all experts by `target_parameters`: LoRA cannot name single ones."""
        stacks = [f"mlp.experts.{stack}" for stack in STACKS]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=stacks)
        return cls(get_peft_model(copy.deepcopy(base), config))

    def step(self, ids: Tensor, term: Callable[[], Tensor] | None = None) -> float:
        """One optimizer step on the model's own loss, plus a further term; returns the loss."""
        loss = self.model(input_ids=ids, labels=ids).loss
        if term is not None:
            loss = loss + term()
        loss.backward()
        self.update()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def optimizer_entries(self) -> int:
        """How many numbers AdamW keeps, without its counts of steps."""
        return sum(t.numel() for state in self.optimizer.state.values() for t in state.values() if t.ndim)


def lora_config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")


class UnfrozenByHand(Adapted):
    """The same tensors with `requires_grad`, in plain PyTorch.

    Two kinds of weights train as an fp32 master copy that is written back after each step: half precision, where small
    updates would be rounded away, and single experts, where only the whole stack can have a gradient.
    """

    def __init__(self, base: nn.Module, units: Sequence[str]) -> None:
        self.model = copy.deepcopy(base).train().requires_grad_(False)
        self.places = [(self.model.get_parameter(n), experts or ...) for n, experts in _by_parameter(units).items()]
        for parameter, _ in self.places:
            parameter.requires_grad_()
        self.masters: list[Tensor] = []
        if not all(place is ... and p.dtype == torch.float32 for p, place in self.places):
            self.masters = [p.detach()[place].to(torch.float32, copy=True) for p, place in self.places]
        self._optimize(self.masters or [p for p, _ in self.places])

    def update(self) -> None:
        pairs = list(zip(self.places, self.masters, strict=False))  # none where the weights train in place
        for (parameter, place), master in pairs:
            assert parameter.grad is not None
            master.grad = parameter.grad[place].float()
            parameter.grad = None
        super().update()
        with torch.no_grad():
            for (parameter, place), master in pairs:
                parameter[place] = master.to(parameter.dtype)

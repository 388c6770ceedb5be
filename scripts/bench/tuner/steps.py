"""Training steps of CondFT against LoRA and against the same tensors unfrozen by hand."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from condft.retention.self_distillation import SelfDistillation, SelfDistillationConfig
from scripts.bench.race import medians, race, ratio
from scripts.bench.tuner.models import Adapted, UnfrozenByHand, batch, entries_of, moe, quarter_of_experts, smollm2

__all__ = [
    "EXPERT_WORK",
    "STEP_WORK",
    "compared",
    "distilled_steps",
    "expert_steps",
    "extra_operations",
    "smollm2_steps",
]

TOKENS = 512
SECONDS = {"smollm2": 60.0, "experts": 14.0, "distilled": 60.0}  # after which no further round of a row begins
DTYPES = (torch.float32, torch.bfloat16)
STEP_WORK = list(DTYPES)
# All at the batch of the other rows; where the arithmetic weighs most, also at a smaller and a larger one.
EXPERT_WORK = [
    (kind, implementation, dtype, tokens)
    for kind in ("mixtral", "olmoe")
    for implementation, sizes in (("eager", (TOKENS,)), ("grouped_mm", (TOKENS // 4, TOKENS, TOKENS * 4)))
    for dtype in DTYPES
    for tokens in sizes
]


class CountedOperations(TorchDispatchMode):
    """How often each operation runs, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def extra_operations(ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, int]:
    """Operations that ours runs more often, or less often (negative): a count has no noise."""
    counts = []
    for work in (ours, theirs):
        with CountedOperations() as counted:
            work()
        counts.append(counted.counts)
    mine, others = counts
    return {name: mine[name] - others[name] for name in sorted(mine | others) if mine[name] != others[name]}


@lru_cache
def share_of_products(kind: str, tokens: int) -> float:
    """Flops of the dense products in CondFT's step over those in LoRA's: the ratio if only arithmetic took time.

    Counted with the eager implementation, because torch's counter does not know grouped products; both multiply the
    same matrices.
    """
    base = moe(kind, "eager", torch.bfloat16)
    flops = []
    for contestant in (Adapted.by_condft(base, quarter_of_experts(base)), Adapted.by_lora_on_experts(base)):
        with FlopCounterMode(display=False) as counted:
            contestant.step(batch(base, tokens))
        flops.append(counted.get_total_flops())
    return flops[0] / flops[1]


def smollm2_steps(dtype: torch.dtype, units: list[str], repeats: int, tick: Callable[[], Any]) -> dict[str, Any]:
    base = smollm2(dtype)
    contestants = {
        "condft": Adapted.by_condft(base, units),
        "unfrozen": UnfrozenByHand(base, units),
        "lora": Adapted.by_lora(base),
    }
    found = compared(contestants, batch(base, TOKENS), repeats, SECONDS["smollm2"], tick)
    steps = [partial(contestants[name].step, batch(base, 32)) for name in ("condft", "unfrozen")]
    return {
        "work": "smollm2",
        "dtype": _name(dtype),
        "tokens": TOKENS,
        "selected_entries": entries_of(base, units),
        **found,
        "operations_beyond_unfrozen": extra_operations(*steps),
    }


def distilled_steps(dtype: torch.dtype, units: list[str], repeats: int, tick: Callable[[], Any]) -> dict[str, Any]:
    """As many steps as have one self-distillation term by the recipe's defaults, against as many without it."""
    base, settings = smollm2(dtype), SelfDistillationConfig()
    plain, distilled = (Adapted.by_condft(base, units) for _ in range(2))
    size = settings.per_device_batch_size
    texts = batch(base, size * (settings.num_tokens + 1), samples=size)
    model: Any = distilled.model
    distillation = SelfDistillation(settings, texts, model.disable_adapter, seed=0)
    ids = batch(base, TOKENS)

    def turn(adapted: Adapted, term: Callable[[], Tensor] | None) -> None:
        for _ in range(settings.every - 1):
            adapted.step(ids)
        adapted.step(ids, term)

    def kl() -> Tensor:
        return settings.weight * distillation.kl_to_base(model, model, texts)

    contestants = {"distilled": partial(turn, distilled, kl), "plain": partial(turn, plain, None)}
    runs = race(contestants, rounds=repeats, seconds=SECONDS["distilled"], tick=tick)
    return {
        "work": "smollm2",
        "dtype": _name(dtype),
        "tokens": TOKENS,
        "settings": settings.model_dump(mode="json"),
        "turn": medians(runs),
        "against_plain": ratio(runs, "distilled", "plain"),
        "runs": runs,
    }


def expert_steps(
    kind: str, implementation: str, dtype: torch.dtype, tokens: int, repeats: int, tick: Callable[[], Any]
) -> dict[str, Any]:
    base = moe(kind, implementation, dtype)
    units = quarter_of_experts(base)
    contestants = {"condft": Adapted.by_condft(base, units), "lora": Adapted.by_lora_on_experts(base)}
    if implementation == "grouped_mm":  # in eager mode autograd makes a gradient of the whole stack for every expert
        contestants["unfrozen"] = UnfrozenByHand(base, units)
    found = compared(contestants, batch(base, tokens), repeats, SECONDS["experts"], tick)
    return {
        "work": kind,
        "implementation": implementation,
        "dtype": _name(dtype),
        "tokens": tokens,
        "selected_entries": entries_of(base, units),
        "share_of_products": share_of_products(kind, tokens),
        **found,
    }


def compared(
    contestants: Mapping[str, Adapted], ids: Tensor, repeats: int, seconds: float, tick: Callable[[], Any]
) -> dict[str, Any]:
    """Seconds per step of each, and the ratio of the first to every other."""
    ours, *others = contestants
    steps = {name: partial(contestant.step, ids) for name, contestant in contestants.items()}
    runs = race(steps, rounds=repeats, seconds=seconds, tick=tick)
    return {
        "step": medians(runs),
        **{f"against_{name}": ratio(runs, ours, name) for name in others},
        "trained": {
            name: sum(p.numel() for p in contestant.model.parameters() if p.requires_grad)
            for name, contestant in contestants.items()
        },
        "runs": runs,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

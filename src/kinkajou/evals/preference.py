"""How often a reward model prefers what people prefer."""

import torch

from kinkajou.algos.preferences import wilson_interval
from kinkajou.algos.tensors import Sum, alone
from kinkajou.batch import PairBatch, Passes, passed
from kinkajou.models.forward import ScalarModel


@torch.no_grad()
def preference_accuracy(
    model: ScalarModel, pairs: PairBatch, tokens_per_microbatch: int, *, all_sum: Sum = alone, passes: Passes = int
) -> dict[str, float]:
    """Share of pairs whose chosen side scores higher (a tie counts half), its 95 % interval, mean margin."""
    total = torch.zeros(3, dtype=torch.float64, device=model.device)
    for part, counts in passed(pairs.to(model.device), tokens_per_microbatch, passes):
        both = part.stacked()
        chosen, rejected = model(both.tokens, both.mask, at="end").view(-1, 2).unbind(1)
        margin = (chosen - rejected).double()
        wins = (margin > 0).double() + 0.5 * (margin == 0).double()
        total += counts * torch.stack([wins.sum(), margin.sum(), part.count.double()])
    wins_all, margins, count = all_sum(total).tolist()
    low, high = wilson_interval(wins_all, int(count))
    return {
        "eval_accuracy": wins_all / count,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_margin": margins / count,
        "eval_pairs": count,
    }

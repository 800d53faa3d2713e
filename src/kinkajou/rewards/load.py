"""From the specs of a recipe to one judge."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from kinkajou.batch import Passes
from kinkajou.data.tokenizer import check_vocabulary
from kinkajou.errors import UserError
from kinkajou.memory import Budget
from kinkajou.models.forward import Dtype, ScalarModel
from kinkajou.models.load import LoadOptions, find_model, load_scalar_model
from kinkajou.rewards.function import Function
from kinkajou.rewards.judges import Ensemble, Judge, ModelJudge, RuleJudge, Term, TextJudge, WeightedSum
from kinkajou.rewards.remote import Service
from kinkajou.rewards.rules import parse_rule
from kinkajou.rewards.specs import Spec, check_specs, parse_specs, reward_model_folder

__all__ = ["check_specs", "load_judge", "parse_specs", "reward_model_folder"]

Place = Callable[[nn.Module], nn.Module]


def load_judge(
    specs: Sequence[str],
    *,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Dtype,
    place: Place,
    passes: Passes = int,
    tokens_per_microbatch: int | Budget,
    ensemble_penalty: float,
    timeout_s: float,
    retries: int,
    ready: Mapping[str, ScalarModel] = MappingProxyType({}),
) -> Judge:
    """The weighted sum of what the specs name, ready to be asked; `tokenizer` is the policy's.

    `place` puts a reward model where it computes, `passes` is the strategy's.  `ready` are reward models that are
    loaded already, by the folder that a spec names.
    """
    terms = parse_specs(specs)
    if not terms:
        raise UserError("there is no reward", fix="--reward rule:ended, or a reward model's folder")

    def reward_model(folder: str) -> Judge:
        model = ready[folder] if folder in ready else load_reward_model(folder, tokenizer, dtype, place)
        return ModelJudge(model, tokens_per_microbatch=tokens_per_microbatch, passes=passes)

    def judge(term: Spec) -> Judge:
        match term.kind:
            case "rule":
                return RuleJudge(parse_rule(term.body))
            case "model":
                return reward_model(term.body)
            case "ensemble":
                return Ensemble([reward_model(folder) for folder in term.body.split(",")], penalty=ensemble_penalty)
            case "service":
                return TextJudge(Service(term.body, timeout_s=timeout_s, retries=retries))
            case "function":
                return TextJudge(Function(term.body, timeout_s=timeout_s))

    times = Counter(term.name for term in terms)
    names = [term.name if times[term.name] == 1 else term.body for term in terms]
    return WeightedSum([Term(name, term.weight, judge(term)) for name, term in zip(names, terms, strict=True)])


def load_reward_model(folder: str, tokenizer: PreTrainedTokenizerBase, dtype: Dtype, place: Place) -> ScalarModel:
    """A reward model that reads the policy's tokens as they are: their vocabularies must be equal."""
    source = find_model(folder)
    fix = "train the reward model from the policy's SFT model, or with its tokenizer"
    check_vocabulary(source, tokenizer, other="reward model", fix=fix)
    model = load_scalar_model(source, tokenizer, LoadOptions(dtype=dtype), fresh=False).freeze()
    return cast(ScalarModel, place(model))

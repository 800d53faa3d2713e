"""LoRA through PEFT (Hu 2021), on every linear layer, GPT-2's transposed ones included."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kinkajou.errors import UserError
from kinkajou.hub import is_path
from kinkajou.models import quantised
from kinkajou.untrusted import check_adapter

with quantised.absent("bitsandbytes"):  # PEFT would import it because it is installed; our layers do without
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.import_utils import is_bnb_available

    is_bnb_available()  # PEFT keeps the first answer; in a program that imported it before, that one stays

TRAINED = "default"
"""PEFT's name of the adapter that a model is given first."""


def add_lora(model: nn.Module, *, rank: int, alpha: float | None, scalar: bool) -> nn.Module:
    """Freezes the model and adds adapters; a scalar head stays trainable as it is."""
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, 2 * rank if alpha is None else alpha),
        target_modules="all-linear",
        modules_to_save=["score"] if scalar else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
    )
    with renames_ignored():
        return cast(nn.Module, get_peft_model(cast(Any, model), config))


@contextmanager
def renames_ignored() -> Iterator[None]:
    """PEFT 0.21 reads a name that transformers 5.23 renames."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def merged_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `merged` would hold, from the model's weights by name: W + scale B A for each adapted W (Hu 2021, eq. 3)."""
    if not isinstance(model, PeftModel):
        return weights
    found = {}
    weights = {name: x.float() for name, x in quantised.plain_names(model, weights).items()}
    for name, x in weights.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.removeprefix("base_model.model.")
        plain = plain.replace(".base_layer.", ".").replace(f".modules_to_save.{TRAINED}.", ".")
        if name.endswith(".base_layer.weight"):
            stem = name.removesuffix(".base_layer.weight")
            layer = cast(Any, model.get_submodule(stem))
            a, b = (weights[f"{stem}.lora_{side}.{TRAINED}.weight"] for side in "AB")
            delta = (b @ a) * layer.scaling[TRAINED]
            turned = layer.fan_in_fan_out or getattr(layer.base_layer, "transposed", False)
            x = x + (delta.T if turned else delta)
        found[plain] = x
    return found


@contextmanager
def base_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters are off: the model is what it was before LoRA."""
    assert isinstance(model, PeftModel)
    with model.disable_adapter():
        yield


@contextmanager
def second_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, that adapter is at work instead of the trained one."""
    assert isinstance(model, PeftModel)
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(TRAINED)


def add_second_adapter(model: nn.Module, folder: str, name: str) -> Tensor:
    """Lays a saved reward model's adapter beside the trained one, frozen; returns its head's weight, (1, c)."""
    assert isinstance(model, PeftModel)
    with renames_ignored():
        form = PeftConfig.from_pretrained(folder)
        form.modules_to_save, form.task_type, form.inference_mode = None, "CAUSAL_LM", True
        model.add_adapter(name, form)
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        (head,) = (weights.pop(key) for key in list(weights) if key.endswith("score.weight"))
        report: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    if report.unexpected_keys:
        raise UserError(
            f"the adapter {folder} does not fit the policy's model", evidence=", ".join(report.unexpected_keys[:3])
        )
    model.set_adapter(TRAINED)
    return head


def adapter_base(folder: str) -> str | None:
    """The base model that an adapter folder names, None if the folder holds no adapter."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        return None
    base = check_adapter(Path(folder)).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{path} does not name its base model", fix="set base_model_name_or_path in it")
    if is_path(base) and not Path(base).is_dir():
        raise UserError(f"{path} names a base model that is not there", evidence=base, fix="correct the path in it")
    return base


def apply_adapter(model: nn.Module, folder: str) -> nn.Module:
    """Folds a saved adapter into its base model, all of whose weights can then be trained.

    A quantised base has plain weights of the same numbers afterwards: the sum with an adapter has no such form.
    """
    if quantised.is_quantised(model):
        model = quantised.dequantise(model)
    try:
        with renames_ignored():
            # Adapters of a quantised GPT-2 were trained on layers that are not transposed; PEFT turns them.
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
            loaded = PeftModel.from_pretrained(cast(Any, model), folder)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as fault:
        raise UserError(
            f"the adapter {folder} does not fit the model that it names",
            evidence=" ".join(str(fault).split())[:300],
        ) from None
    return cast(nn.Module, loaded.merge_and_unload()).requires_grad_(True)  # PEFT froze what it adapted


def save_adapted(model: nn.Module, folder: str, weights: dict[str, Tensor] | None = None, *, shard: str) -> None:
    """A plain model, or adapters alone: an embedding grown by a pad token is not stored, its row is not trained."""
    own: dict[str, Any] = (
        {"save_embedding_layers": False, "selected_adapters": [TRAINED]}
        if isinstance(model, PeftModel)
        else {"max_shard_size": shard}
    )
    given = {} if weights is None else {"state_dict": weights}
    cast(Any, model).save_pretrained(folder, **own, **given)


def whole_weights(folder: str) -> set[str]:
    """Names of the weights that an adapter folder holds whole: a reward model's head."""
    kept = json.loads((Path(folder) / "adapter_config.json").read_text()).get("modules_to_save") or ()
    return {f"{name}.weight" for name in kept}


Save = Literal["merged", "adapter"]

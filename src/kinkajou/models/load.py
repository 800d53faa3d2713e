"""Models from folders, hub ids and presets; every load is checked before it is used."""

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from kinkajou.checkpoint.place import Place
from kinkajou.checkpoint.shelf import Shelf
from kinkajou.errors import UserError
from kinkajou.hub import from_disk
from kinkajou.models import adapters, attention, bloom, quantised, quantised_files
from kinkajou.models.folder import SHARD, write_weights
from kinkajou.models.forward import Dtype, LanguageModel, PackedModel, ScalarModel, pack
from kinkajou.models.heads import init_scalar_head
from kinkajou.models.presets import PRESETS, preset_config
from kinkajou.untrusted import check_settings, check_weights

attention.register()
transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is to be made ready, whatever it is made from."""

    family: str | None = None
    dtype: Dtype = "fp32"
    lora_rank: int = 0
    lora_alpha: float | None = None
    gradient_checkpointing: bool = False
    context: int = 512
    seed: int = 0
    bits: quantised.Bits = 16
    """8 or 4: the weights are quantised while loading (quantised.py)."""
    checked: bool = True
    """Whether ten tokens show that the forward pass is right; weights that have broken would fail it."""


DEFAULTS = LoadOptions()
BUFFERS = r"\.(inv_freq|masked_bias|attn\.bias|attention\.bias)$"
HARMLESS = {
    False: re.compile(rf"^(score|v_head)\.|{BUFFERS}"),
    True: re.compile(rf"(^|\.)lm_head\.|^v_head\.|{BUFFERS}"),
}
"""Weights that may be left in the files: the head of the other kind of model, and what is computed anew."""


def find_model(source: str) -> str:
    """A run folder's best checkpoint, else its newest; any other source as it is."""
    folder = Path(source)
    shelf = Shelf(folder / "checkpoints")
    kept = shelf.named()
    if not kept:
        return source
    best = folder / "best.json"
    chosen = Place(json.loads(best.read_text())["step"]) if best.is_file() else kept[-1]
    return str(shelf.path(chosen))


def load_language_model(
    source: str, tokenizer: PreTrainedTokenizerBase, options: LoadOptions = DEFAULTS
) -> LanguageModel:
    """A causal LM with float32 weights, no dropout, its embedding at least as long as the tokenizer."""
    module = load_module(source, tokenizer, options, scalar=False)
    return cast(LanguageModel, finish(LanguageModel(module, dtype=options.dtype), options, scalar=False))


def load_scalar_model(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions = DEFAULTS,
    *,
    fresh: bool = True,
) -> ScalarModel:
    """A trunk with a scalar head.  `fresh` allows a source without a head, which then starts as the contract says."""
    module = load_module(source, tokenizer, options, scalar=True, fresh=fresh)
    return cast(ScalarModel, finish(ScalarModel(module, dtype=options.dtype), options, scalar=True))


def load_module(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions,
    *,
    scalar: bool,
    fresh: bool = True,
) -> nn.Module:
    base = adapters.adapter_base(source)
    config = read_config(base or source, tokenizer, options)
    check_family(source, config, options.family)
    stored = quantised_files.bits_of(base or source, config)
    if scalar:
        config.num_labels = 1
    if not scalar and any(name.endswith("SequenceClassification") for name in config.architectures or ()):
        raise UserError(f"{source} holds a reward model, not a language model")
    for name, value in list(vars(config).items()):
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)  # dropout would make old and new log-probabilities differ at ratio 1
    if source in PRESETS:
        torch.manual_seed(options.seed)
        kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        made = kind.from_config(config, attn_implementation=interface(config))  # type: ignore[no-untyped-call]
        module = cast(nn.Module, made)
        missing = {"score.weight"}
    else:
        module, missing = read_weights(base or source, config, scalar=scalar)
    fit_vocabulary(module, tokenizer, base or source)
    if base:  # after the vocabulary: adapters were trained on the grown embedding
        module = adapters.apply_adapter(module, source)
        missing -= adapters.whole_weights(source)
    if scalar and "score.weight" in missing:
        if not fresh:
            raise UserError(f"{source} has no scalar head, so it is no reward model", fix="train one: kinkajou reward")
        init_scalar_head(cast(nn.Linear, module.score), seed=options.seed)
    if config.model_type == "bloom":
        bloom.install(module)
    if options.bits != 16 and (stored != options.bits or base):
        if stored != 16 and not base:
            raise UserError(f"{source} has {stored}-bit weights", fix=f"leave --bits out, or --bits {stored}")
        quantised.quantise(module, options.bits)
    return module


def interface(config: PreTrainedConfig) -> str:
    return "eager" if config.model_type == "bloom" else attention.NAME


def read_config(source: str, tokenizer: PreTrainedTokenizerBase, options: LoadOptions) -> PreTrainedConfig:
    if source in PRESETS:
        return preset_config(
            source,
            vocab_size=len(tokenizer),
            context=options.context,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return read_settings(source)


def read_settings(source: str) -> PreTrainedConfig:
    """What a folder or a hub id says of its model, without weights or tokenizer."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{source} holds no model", evidence="there is no config.json in it")
    local = from_disk(source)
    check_settings(source)
    try:
        found = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local)
        return cast(PreTrainedConfig, found)
    except (StrictDataclassError, ZeroDivisionError, TypeError) as fault:
        raise UserError(
            f"the settings of the model {source!r} are broken",
            evidence=" ".join(str(fault).split())[:300],
            fix="mend its config.json, or take the one that the weights came with",
        ) from None
    except (OSError, ValueError, KeyError, AttributeError) as fault:
        raise UserError(
            f"no model could be read from {source!r}",
            evidence=(str(fault).splitlines() or [type(fault).__name__])[0][:300],
            fix=f"give a folder, a hub id, or a preset: {', '.join(PRESETS)}",
        ) from None


def check_family(source: str, config: PreTrainedConfig, family: str | None) -> None:
    if family and config.model_type != family:
        raise UserError(
            f"{source} is a {config.model_type} model, not {family}",
            fix=f"say {config.model_type}, or leave the family out: it is detected",
        )


def read_weights(source: str, config: PreTrainedConfig, *, scalar: bool) -> tuple[nn.Module, set[str]]:
    """The model and the names of weights that the source lacks; only a scalar head may be among them."""
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    check_weights(source)
    packed = quantised_files.bits_of(source, config) != 16
    if packed:
        quantised.library()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is checked below
            loaded: Any = kind.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                attn_implementation=interface(config),
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=from_disk(source),
                output_loading_info=True,
                **({"device_map": {"": "cpu"}} if packed else {}),
            )
    except MemoryError:
        raise
    except Exception as fault:
        # Broken settings fail in the constructor of one of a hundred families: a ZeroDivisionError, an AssertionError,
        # a KeyError; nothing but that constructor and transformers' reader runs inside.
        raise UserError(
            f"the weights of {source!r} could not be read as {config.model_type}",
            evidence=(str(fault).strip().splitlines() or [type(fault).__name__])[0][:300],
            fix="weights must be safetensors that fit config.json",
        ) from None
    module, report = loaded
    missing = set(report["missing_keys"])
    if missing - {"score.weight"}:
        names = sorted(missing)
        raise UserError(f"{source} lacks weights of a {config.model_type} model", evidence=", ".join(names[:5]))
    if other := sorted(name for name in report["unexpected_keys"] if not HARMLESS[scalar].search(name)):
        raise UserError(
            f"{source} holds weights that the model of its config.json does not have",
            evidence=f"{len(other):,}, among them {', '.join(other[:5])}",
            fix="take the config.json that the weights came with; has it fewer layers than they?",
        )
    if packed:
        module = quantised_files.adopt(module, source)
    # The sum needs no second copy; it may overflow where every number is finite.
    sums = ((name, param) for name, param in module.named_parameters() if not param.sum().isfinite())
    if bad := [name for name, param in sums if name not in missing and not param.isfinite().all()]:
        raise UserError(f"the weights of {source} hold NaN or infinity", evidence=", ".join(bad[:5]))
    return cast(nn.Module, module), missing


def fit_vocabulary(module: nn.Module, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Grows the embedding by our own pad token; any other entry beyond its end is refused.

    The new row is the mean of the others, so every load of the same source gives the same model (policy and
    reference), and the new token takes at most 1 / (n + 1) of a distribution (Hewitt 2021, "Initializing New
    Word Embeddings").  A random row can take all of it: GPT-2's logits are far below 0.
    """
    rows = cast(Any, module).get_input_embeddings().weight.shape[0]
    top = max(tokenizer.get_vocab().values()) + 1
    grown = top - 1 if top - 1 == tokenizer.pad_token_id else top
    if grown > rows:
        raise UserError(
            f"the tokenizer does not fit the model {source}",
            evidence=f"it has {grown} entries, the embedding {rows} rows",
            fix="give the tokenizer that the model was trained with (--tokenizer)",
        )
    if top > rows:
        model = cast(Any, module)
        model.resize_token_embeddings(top, mean_resizing=False)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        with torch.no_grad():
            for param in (p for end in ends if end is not None for p in end.parameters()):
                param[rows:] = param[:rows].mean(0)


def finish(model: PackedModel, options: LoadOptions, *, scalar: bool) -> PackedModel:
    """Checks the forward pass, adds adapters, and turns on what training wants."""
    if options.checked:
        check_forward(model)
    if options.lora_rank:
        torch.manual_seed(options.seed)  # adapters start at random
        model.module = adapters.add_lora(model.module, rank=options.lora_rank, alpha=options.lora_alpha, scalar=scalar)
        model.settle()
    if options.gradient_checkpointing:
        inner = model.inner
        # The old name is deprecated in transformers 5.23, the new one is not in 5.17.
        enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": model.computing_again})
        if options.lora_rank:
            inner.enable_input_require_grads()
    model.train(options.gradient_checkpointing)
    return model


@torch.no_grad()
def check_forward(model: PackedModel) -> None:
    """Packed sequences do not see each other, and trunk plus head is the whole model: else refuse.

    This is where an architecture that does not go through our attention function is found out.
    """
    rows = max(2, int(model.inner.get_input_embeddings().weight.shape[0]))
    tokens = (torch.arange(10, device=model.device).view(2, 5) * 7 + 1) % rows
    lengths = torch.tensor([5, 4], device=model.device)
    both, alone = pack(tokens, lengths), pack(tokens[1:], lengths[1:])
    try:
        together = model.hidden(both.ids, both.positions, both.layout)
        apart = model.hidden(alone.ids, alone.positions, alone.layout)
        same = torch.allclose(together[5:], apart, atol=1e-4, rtol=1e-3)
        whole = model.inner.config.model_type != "bloom"  # its outer forward does not hand the layout on
        if same and whole and isinstance(model, LanguageModel):
            full = model.inner(
                input_ids=both.ids, position_ids=both.positions, use_cache=False, layout=both.layout
            ).logits.squeeze(0)
            same = torch.allclose(model.logits(together), full, atol=1e-4, rtol=1e-3)
    except TypeError as fault:
        same, detail = False, str(fault)
    else:
        detail = "packed sequences influence each other, or the model changes its logits after the head"
    if not same:
        raise UserError(
            f"kinkajou cannot run {model.inner.config.model_type!r} models",
            evidence=detail,
            fix="use an architecture that goes through transformers' attention interface",
        )


def save_model(
    model: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_ids: Iterable[int] = (),
    lora: adapters.Save = "merged",
    shard: str = SHARD,
    apart: bool = False,
) -> None:
    """A plain Hugging Face folder: safetensors, config, tokenizer with template, generation settings.

    `end_ids` are all tokens that end an answer; other programs stop at them too.  `shard` is the size of the largest
    file, `apart` is for a policy whose critic shares its trunk (`save_shared_critic`).
    """
    weights = dict(model.module.state_dict())
    model_files(model, tokenizer, end_ids=end_ids, lora=lora, weights=weights, shard=shard, apart=apart)(folder)


def model_files(
    model: PackedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    end_ids: Iterable[int],
    lora: adapters.Save,
    weights: Mapping[str, Tensor] | None,
    shard: str = SHARD,
    apart: bool = False,
) -> Callable[[Path], None]:
    """What writes the folder of `save_model` with these weights, the module's own by name, whatever it holds by then.

    None for the weights where this process writes nothing.
    """
    inner = model.inner
    if lora == "merged" and isinstance(model, LanguageModel) and inner.generation_config is not None:
        inner.generation_config.eos_token_id = sorted({int(tokenizer.eos_token_id), *end_ids})
        inner.generation_config.pad_token_id = tokenizer.pad_token_id
    inner.config.pad_token_id = tokenizer.pad_token_id
    settings = copy.deepcopy(getattr(inner, "generation_config", None))

    def write(folder: Path) -> None:
        assert weights is not None
        if lora == "merged":
            plain = copy.deepcopy(inner.config)
            if hasattr(plain, "quantization_config"):
                del plain.quantization_config  # merged weights are what they were before, and more
            with torch.device("meta"):
                shell: Any = type(inner)(plain)
            if settings is not None:
                shell.generation_config = settings
            whole = adapters.merged_weights(model.module, dict(weights))
            write_weights(shell, folder, whole, shard=shard, apart=apart)
        else:
            write_weights(model.module, folder, dict(weights), shard=shard)
        tokenizer.save_pretrained(str(folder))

    return write

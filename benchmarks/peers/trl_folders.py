"""TRL 1.16 trains a step from each folder: SFT and DPO from policies, a reward model from scalar ones.

`FOLDER` holds `jobs.json` (tokens; by name what each folder is) and gets `found.json`: losses, what was said at
opening, log-probabilities or scores of the tokens before the step.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

TEXTS = [{"text": f"w{i} w{i + 1} w{i + 2}"} for i in range(2, 10)]
PAIRS = [{"prompt": f"w{i} ", "chosen": f"w{i + 1} w7", "rejected": f"w{i + 2}"} for i in range(2, 10)]
KINDS: dict[str, list[tuple[str, Any, Any, list[dict[str, str]]]]] = {
    "policy": [("sft", SFTTrainer, SFTConfig, TEXTS), ("dpo", DPOTrainer, DPOConfig, PAIRS)],
    "scalar": [("reward", RewardTrainer, RewardConfig, PAIRS)],
}


class Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


@torch.no_grad()
def numbers(model: Any, tokens: list[list[int]]) -> list[list[float]]:
    found = []
    for row in tokens:
        ids = torch.tensor([row])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if logits.ndim == 2:
            found.append(logits[0].tolist())
        else:
            logp = logits[:, :-1].float().log_softmax(-1)
            found.append(logp.gather(-1, ids[:, 1:, None])[0, :, 0].tolist())
    return found


def trained(folder: Path, job: dict[str, Any], tokens: list[list[int]], output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, trainer, config, rows in KINDS[job["kind"]]:
        adapter = (folder / "adapter_config.json").is_file()
        if adapter and name == "dpo":
            continue  # its reference would be another model than the one that the adapter is on
        ear = Ear()
        logging.getLogger("transformers").addHandler(ear)
        args = config(
            output_dir=str(output),
            per_device_train_batch_size=8,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            save_strategy="no",
            model_init_kwargs=None if adapter else {"dtype": "float32"},
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # TRL takes the path of a model, but of an adapter the opened model.
            model: Any = AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True) if adapter else str(folder)
            words = AutoTokenizer.from_pretrained(folder)
            made = trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words)
        logging.getLogger("transformers").removeHandler(ear)
        found.setdefault("numbers", numbers(made.model.eval(), tokens))
        said = [text for text in ear.heard if "LOAD REPORT" in text]
        said += [str(one.message) for one in caught if str(folder) in str(one.message)]
        found.setdefault("said", []).extend(said)
        found[f"{name}_loss"] = made.train().training_loss
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    transformers_logging.set_verbosity_warning()
    torch.set_num_threads(1)
    given = json.loads((folder / "jobs.json").read_text())
    found = {name: trained(folder / name, job, given["tokens"], folder / "out") for name, job in given["jobs"].items()}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

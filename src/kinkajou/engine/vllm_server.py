"""One vLLM server over HTTP: what it is asked, and whether its answers are what was asked for.

The routes are those of vLLM 0.32 (`/v1/completions`, `/v1/models`, `/v1/load_lora_adapter`; in its development mode
`/collective_rpc`, `/weight_info`, `/reset_prefix_cache`).
"""

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from kinkajou.batch import PLAIN, Sampling
from kinkajou.data import strict_json
from kinkajou.data.records import shown
from kinkajou.engine.engine import Answered
from kinkajou.errors import UserError
from kinkajou.exchange import FAULTS, Host, Reply, TooMuch, reason_of

TRIES, FIRST_PAUSE_S = 3, 0.5
SPARE_BYTES, BYTES_PER_TOKEN = 65_536, 1_024
SEED_BITS = 63
"""vLLM takes signed seeds of 64 bits, and reads -1 as none."""
INSTALL = "python -m venv FOLDER && FOLDER/bin/pip install vllm"
DEVELOPMENT = "start it with VLLM_SERVER_DEV_MODE=1 in its environment, reachable for nobody but the trainer"


class Gone(UserError):
    """The server gives no answer, after all tries."""


class Server:
    """`vocabulary` is the number of entries that the trainer's tokens come from."""

    def __init__(
        self,
        url: str,
        *,
        vocabulary: int,
        end_ids: Sequence[int],
        timeout_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.vocabulary, self.end_ids, self.timeout_s, self.sleep = vocabulary, tuple(end_ids), timeout_s, sleep
        self.url = url.rstrip("/")
        self.host = Host(self.url)
        self.dice = random.Random()
        self.model = ""
        """The name that requests carry; the version of the weights is in it or in `version`."""
        self.version = ""

    def move(self, url: str, name: str) -> None:
        """The server has been started anew, elsewhere, on weights of that name."""
        self.url, self.host, self.model, self.version = url, Host(url), name, ""

    def complete(self, prompt: Sequence[int], sampling: Sampling, *, max_new_tokens: int, seed: int) -> Answered:
        body = {
            **self._request(prompt, sampling),
            "max_tokens": max_new_tokens,
            "seed": seed % 2**SEED_BITS,
            "stop_token_ids": list(self.end_ids),
            "ignore_eos": True,  # the tokens that end an answer are the trainer's
        }
        choice = self._choice(prompt, body, max_new_tokens)
        tokens = self._token_ids(choice.get("token_ids"), "token_ids")
        logps = self._logps((choice.get("logprobs") or {}).get("token_logprobs"), len(tokens))
        if not 1 <= len(tokens) <= max_new_tokens:
            raise self.fault("gives an answer of a wrong length", f"{len(tokens)} tokens, 1 to {max_new_tokens} asked")
        why, ended = choice.get("finish_reason"), tokens[-1] in self.end_ids
        if any(token in self.end_ids for token in tokens[:-1]):
            raise self.fault("goes on after an end token", f"tokens {shown(repr(tokens), 120)}, ends {self.end_ids}")
        if not ended and (why != "length" or len(tokens) < max_new_tokens):
            raise self.fault(
                "ends an answer for a reason that was not asked for", f"{why!r} after {len(tokens)} tokens"
            )
        return Answered(tokens, logps, ended)

    def scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probabilities of tokens 1.. in the model's own distribution."""
        body = {**self._request(tokens, PLAIN), "max_tokens": 1, "seed": 0, "prompt_logprobs": 0}
        found = self._choice(tokens, body, 1).get("prompt_logprobs")
        if not isinstance(found, list) or len(found) != len(tokens):
            raise self.fault("gives no log-probabilities of a prompt", shown(repr(found), 120))
        try:
            return self._logps([row[str(token)]["logprob"] for row, token in zip(found[1:], tokens[1:], strict=True)])
        except (KeyError, TypeError):
            raise self.fault("gives no log-probabilities of a prompt", shown(repr(found), 120)) from None

    def models(self) -> list[dict[str, Any]]:
        found = self.get("/v1/models").get("data")
        if not isinstance(found, list) or not found or not all(isinstance(x, dict) and x.get("id") for x in found):
            raise self.fault("does not say what it serves", shown(repr(found), 120), "is this a vLLM server?")
        return found

    def meet(self, longest: int) -> None:
        """Asks what is served, and whether it can hold the run's sequences and vocabulary."""
        first = self.models()[0]
        self.model, room = str(first["id"]), first.get("max_model_len")
        if not isinstance(room, int) or room < longest:
            evidence = f"max_model_len {room}, the run has up to {longest} tokens"
            raise self.fault("is too short for the run", evidence, f"vllm serve ... --max-model-len {longest}")
        body = {**self._request([self.vocabulary - 1], PLAIN), "max_tokens": 1, "seed": 0}
        reply = self.tried("/v1/completions", body, SPARE_BYTES)
        if reply.status == 400:
            evidence = f"it refuses token {self.vocabulary - 1}: {reply}"
            raise self.fault("has another vocabulary than the policy", evidence, "serve the model that is trained")
        self.read(reply)

    def reload(self, folder: str, version: str) -> None:
        """Takes weights from a folder that it sees too (development mode), and a name for them."""
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}, DEVELOPMENT)
        done = self.post("/reset_prefix_cache", None, DEVELOPMENT)
        if not done.get("success"):
            raise self.fault("keeps what it computed with old weights", "its prefix cache is in use")
        self.post("/update_weight_version", {"new_version": version}, DEVELOPMENT)
        self.version = version
        self.check_version()

    def load_adapter(self, folder: str, name: str) -> None:
        """Takes an adapter from a folder that it sees too, and forgets the one before it."""
        fix = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora and --max-lora-rank"
        before = self.model if self.version else ""
        self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, fix)
        self.model = self.version = name
        if before:
            self.post("/v1/unload_lora_adapter", {"lora_name": before}, fix)
        self.check_version()

    def check_version(self) -> None:
        """Asks back which weights it has: of a reload their name, of an adapter or a restart the model's."""
        if self.model == self.version:
            served = [str(x["id"]) for x in self.models()]
            found = self.version if self.version in served else ", ".join(served)
        else:
            found = str(self.get("/weight_info", DEVELOPMENT).get("weight_version"))
        if self.version and found != self.version:
            evidence = f"{shown(found, 80)}, pushed was {self.version}"
            raise self.fault("has another version of the weights", evidence, "one run for one server")

    def get(self, path: str, fix: str = "") -> dict[str, Any]:
        return self.read(self.tried(path, None, SPARE_BYTES * 16), fix)

    def post(self, path: str, body: Any, fix: str = "") -> dict[str, Any]:
        reply = self.tried(path, {} if body is None else body, SPARE_BYTES)
        if reply.good and not reply.body.strip().startswith(b"{"):
            return {}
        return self.read(reply, fix)

    def read(self, reply: Reply, fix: str = "") -> dict[str, Any]:
        """The object of a good reply."""
        if not reply.good:
            raise self.fault("refuses a request", str(reply), fix or "look at its log")
        try:
            found = strict_json.parse(reply.body.decode())
        except (UnicodeDecodeError, strict_json.JSONFault) as broken:
            raise self.fault(f"sends no sound JSON: {broken}", str(reply), "is this a vLLM server?") from None
        if not isinstance(found, dict):
            raise self.fault("sends no JSON object", str(reply), "is this a vLLM server?")
        return found

    def tried(self, path: str, body: Any, limit: int) -> Reply:
        """A reply, good or a refusal; Gone when none comes or the server fails in every try."""
        text = None if body is None else json.dumps(body, allow_nan=False).encode()
        last = ""
        for number in range(TRIES):
            if number:
                self.sleep(FIRST_PAUSE_S * 2**number * self.dice.uniform(0.5, 1))
            try:
                reply = self.host.ask(path, text, limit=limit, timeout_s=self.timeout_s)
            except FAULTS as fault:
                last = reason_of(fault)
                continue
            except TooMuch as fault:
                raise self.fault("sends too much", str(fault), "is this a vLLM server?") from None
            if not reply.passing:
                return reply
            last = str(reply)
        fix = f"start it (`vllm serve FOLDER`; installed aside by `{INSTALL}`), or --server start:ENVIRONMENT"
        evidence = f"{path}, {TRIES} tries, the last: {last}"
        raise Gone(f"the vLLM server {self.url} gives no answer", evidence=evidence, fix=fix, exit_code=5)

    def fault(self, problem: str, evidence: str, fix: str = "") -> UserError:
        fix = fix or "is this a vLLM server, 0.10.2 or newer, that serves the policy? look at its log"
        return UserError(f"the vLLM server {self.url} {problem}", evidence=evidence, fix=fix, exit_code=5)

    def _request(self, prompt: Sequence[int], how: Sampling) -> dict[str, Any]:
        """Nothing is left to the server's defaults."""
        return {
            "model": self.model,
            "prompt": list(prompt),
            "temperature": how.temperature,
            "top_k": how.top_k,
            "top_p": how.top_p,
            "min_p": how.min_p,
            "repetition_penalty": how.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
        }

    def _choice(self, prompt: Sequence[int], body: dict[str, Any], count: int) -> dict[str, Any]:
        limit = SPARE_BYTES + BYTES_PER_TOKEN * (len(prompt) + count)
        reply = self.read(self.tried("/v1/completions", body, limit))
        choices = reply.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self.fault("gives no single answer", shown(repr(choices), 120))
        if reply.get("model") != self.model:
            raise self.fault("answers for another model", f"{shown(repr(reply.get('model')))}, asked was {self.model}")
        if self._token_ids(choices[0].get("prompt_token_ids"), "prompt_token_ids") != list(prompt):
            raise self.fault("answers another prompt than was sent", shown(repr(choices[0]["prompt_token_ids"]), 120))
        return choices[0]

    def _token_ids(self, found: Any, name: str) -> list[int]:
        if not isinstance(found, list) or any(type(x) is not int for x in found):
            raise self.fault(f"gives no {name}", shown(repr(found), 120))
        if beyond := [x for x in found if not 0 <= x < self.vocabulary]:
            evidence = f"token {beyond[0]}, the policy has {self.vocabulary}"
            raise self.fault("has another vocabulary than the policy", evidence, "serve the model that is trained")
        return found

    def _logps(self, found: Any, count: int | None = None) -> list[float]:
        sound = isinstance(found, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
        if not sound or (count is not None and len(found) != count):
            raise self.fault("gives no log-probability for each token", shown(repr(found), 120))
        if wrong := [x for x in found if not (math.isfinite(x) and x <= 1e-3)]:
            raise self.fault("gives a log-probability that is none", str(wrong[0]))
        return [float(x) for x in found]

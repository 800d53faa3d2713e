"""A stand-in for a vLLM server: its routes, answered by a local engine, with faults to order."""

import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from kinkajou.batch import PLAIN, Sampling
from kinkajou.engine.engine import LocalEngine
from kinkajou.models import adapters
from kinkajou.models.forward import LanguageModel
from kinkajou.models.load import load_language_model

Body = dict[str, Any]


class FakeVllm:
    """Serves a copy of the model given; `reload_weights` reads a folder's model.safetensors.

    `stale` names weights that a reload leaves as they are.  `change` gets each path and reply and returns what is
    sent: another object, bytes as they are, or a number, which is sent as the status of a failure.
    """

    def __init__(
        self, model: LanguageModel, *, vocabulary: int, room: int = 48, port: int = 0, name: str = "policy"
    ) -> None:
        self.model, self.vocabulary, self.room, self.name = model, vocabulary, room, name
        self.adapters: dict[str, LanguageModel] = {}
        self.asked: list[tuple[str, Body]] = []
        self.change: Callable[[str, Body], Any] = lambda path, reply: reply
        self.stale: Callable[[str], bool] = lambda name: False
        self.raw = False
        self.version, self.slow_s, self.dies_after = "default", 0.0, 10**9
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def do_GET(self) -> None:
                self.answer({})

            def answer(self, body: Body) -> None:
                with fake.lock:
                    fake.asked.append((self.path, body))
                    status, reply = fake.reply(self.path, body)
                time.sleep(fake.slow_s)
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                if fake.count("/v1/completions") > fake.dies_after:
                    return self.connection.close()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
                return None

            def log_message(self, *args: object) -> None:
                """Nothing on the terminal."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def count(self, path: str) -> int:
        return sum(where == path for where, _ in self.asked)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def reply(self, path: str, body: Body) -> tuple[int, Any]:
        status, reply = self.plain(path, body)
        if status != 200:
            return status, reply
        changed = self.change(path, reply)
        return (changed, {"error": "ordered"}) if isinstance(changed, int) else (200, changed)

    def plain(self, path: str, body: Body) -> tuple[int, Any]:
        if path == "/v1/models":
            return 200, {"data": [{"id": name, "max_model_len": self.room} for name in (self.name, *self.adapters)]}
        if path == "/health":
            return 200, {}
        if path == "/v1/load_lora_adapter":
            adapted = adapters.apply_adapter(copy.deepcopy(self.model.module), body["lora_path"])
            self.adapters[body["lora_name"]] = LanguageModel(adapted.eval())
            return 200, b"Success"
        if path == "/v1/unload_lora_adapter":
            del self.adapters[body["lora_name"]]
            return 200, b"Success"
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True}
        if path == "/collective_rpc":
            self.reload(Path(body["kwargs"]["weights_path"]))
            return 200, {"results": [None]}
        if path == "/v1/completions":
            return self.complete(body)
        return 404, {"detail": "Not Found"}

    @torch.no_grad()
    def reload(self, folder: Path) -> None:
        own = self.model.module.state_dict()
        for name, weights in load_file(folder / "model.safetensors").items():
            if not self.stale(name):
                own[name].copy_(weights)

    def complete(self, body: Body) -> tuple[int, Any]:
        prompt = body["prompt"]
        if max(prompt) >= self.vocabulary:
            return 400, {"error": {"message": f"Token id {max(prompt)} is out of vocabulary"}}
        how = Sampling(body["temperature"], body["top_k"], body["top_p"], body["min_p"], body["repetition_penalty"])
        model = self.adapters.get(body["model"], self.model)
        engine = LocalEngine(model, end_ids=body.get("stop_token_ids", [2]), pad_id=0)
        count = min(body["max_tokens"], self.room - len(prompt))
        rollout = engine.generate([prompt], how, max_new_tokens=count, seeds=[body["seed"]])
        if self.raw:
            rollout = type(rollout)(rollout.tokens, rollout.mask, self.scored(model, rollout), rollout.ended)
        tokens, logps = rollout.tokens[0, 1:][rollout.mask[0]], rollout.sampler_logp[rollout.mask]
        choice = {
            "finish_reason": "stop" if rollout.ended[0] else "length",
            "token_ids": tokens.tolist(),
            "prompt_token_ids": prompt,
            "logprobs": {"token_logprobs": logps.tolist()},
            "prompt_logprobs": self.prompt_logprobs(model, prompt) if "prompt_logprobs" in body else None,
        }
        return 200, {"model": body["model"], "choices": [choice]}

    @torch.no_grad()
    def scored(self, model: LanguageModel, batch: Any) -> torch.Tensor:
        logp: torch.Tensor = model(batch.tokens, batch.mask, PLAIN).logp
        return logp

    @torch.no_grad()
    def prompt_logprobs(self, model: LanguageModel, prompt: list[int]) -> list[Any]:
        tokens = torch.tensor([prompt])
        logp = model(tokens, torch.ones(1, len(prompt) - 1, dtype=torch.bool), PLAIN).logp[0]
        return [None, *({str(t): {"logprob": float(x)}} for t, x in zip(prompt[1:], logp, strict=True))]


def main(options: list[str]) -> None:
    """What `vllm serve` does, for those who start one."""
    given = dict(zip(options[::2], options[1::2], strict=False))
    folder = given["--model"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    FakeVllm(
        load_language_model(folder, tokenizer).freeze(),
        vocabulary=len(tokenizer),
        room=int(given["--max-model-len"]),
        port=int(given["--port"]),
        name=given["--served-model-name"],
    )


if __name__ == "__main__":
    main(sys.argv[1:])

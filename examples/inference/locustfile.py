"""Load on /generate and /generate/stream: `locust -f locustfile.py --host http://127.0.0.1:7070`.

The server lets one client in once a second: start it with `kinkajou serve FOLDER --rate 0` for more.  With a key:
KINKAJOU_API_KEY.
"""

import os

from locust import HttpUser, between, task

INSTRUCTIONS = ("Name three fruits.", "Why is the sky blue?", "Give a tip for a tidy kitchen.")
KEY = os.environ.get("KINKAJOU_API_KEY", "")


def body(asked: str) -> dict[str, object]:
    return {
        "max_new_tokens": 64,
        "history": [{"instruction": "Hello.", "response": "Hello!"}, {"instruction": asked, "response": ""}],
        "top_k": 50,
        "top_p": 0.95,
        "temperature": 0.7,
    }


class Talker(HttpUser):
    """Asks, waits a second, asks again."""

    wait_time = between(1, 2)

    def on_start(self) -> None:
        if KEY:
            self.client.headers["authorization"] = f"Bearer {KEY}"
        self.asked = 0

    @task(3)
    def whole(self) -> None:
        with self.client.post("/generate", json=self.next_body(), catch_response=True) as reply:
            if reply.status_code == 200 and not isinstance(reply.json(), str):
                reply.failure("the answer is no JSON string")

    @task(1)
    def stream(self) -> None:
        with self.client.post("/generate/stream", json=self.next_body(), stream=True, catch_response=True) as reply:
            names = [line[7:] for line in reply.iter_lines() if line.startswith(b"event: ")]
            if reply.status_code == 200 and (not names or names[-1] != b"end"):
                reply.failure(f"the stream ended with {names[-1:]}")

    def next_body(self) -> dict[str, object]:
        self.asked += 1
        return body(INSTRUCTIONS[self.asked % len(INSTRUCTIONS)])

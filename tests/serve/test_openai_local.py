"""The official client in front of a real model in its own process."""

import asyncio
from typing import Any

import openai
import pytest
from place import make_house, served

from kinkajou.serve.local import Hosting, LocalBackend
from small import Small


def test_the_client_and_a_model(small: Small) -> None:
    def work(client: openai.OpenAI) -> None:
        messages: Any = [{"role": "user", "content": "w3 w4 w5"}]
        asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_tokens": 6}
        greedy = client.chat.completions.create(**asked, temperature=0, n=2, logprobs=True, top_logprobs=3)
        first, second = greedy.choices
        text = first.message.content
        assert text == second.message.content
        assert first.logprobs
        assert first.logprobs.content
        for row in first.logprobs.content:  # greedy: what was said is the likeliest
            assert len(row.top_logprobs) == 3
            assert row.logprob == pytest.approx(max(other.logprob for other in row.top_logprobs))
            assert row.logprob <= 0
        said = sum(len(choice.logprobs.content or []) for choice in greedy.choices if choice.logprobs)
        assert greedy.usage
        assert greedy.usage.completion_tokens == said
        assert greedy.usage.total_tokens == greedy.usage.prompt_tokens + said

        stream = client.chat.completions.create(**asked, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text

        seeded = [
            client.chat.completions.create(**asked, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3)
        ]
        assert seeded[0] == seeded[1]
        assert len(set(seeded)) > 1

        assert text
        word = text.split()[1]
        stopped = client.chat.completions.create(**asked, temperature=0, stop=word).choices[0]
        assert (stopped.message.content or "").rstrip() == text[: text.index(word)].rstrip()
        assert stopped.finish_reason == "stop"

        several = client.completions.create(
            model="tiny", prompt=["w3 w4", "w5"], max_tokens=3, temperature=0, logprobs=1
        )
        alone = [
            client.completions.create(model="tiny", prompt=x, max_tokens=3, temperature=0) for x in ("w3 w4", "w5")
        ]
        assert [choice.text for choice in several.choices] == [found.choices[0].text for found in alone]
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt="w3 " * 100)
        assert caught.value.code == "context_length_exceeded"

    async def beside() -> None:
        backend = LocalBackend("tiny", small.policy, Hosting(template="plain", threads=1, slots=4))
        try:
            async with served(make_house({"tiny": backend})) as place:
                base = f"http://127.0.0.1:{place.port}/v1"
                with openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=30) as client:
                    await asyncio.to_thread(work, client)
        finally:
            await backend.close()

    asyncio.run(beside())

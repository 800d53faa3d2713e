"""The word filter on OpenAI's routes."""

from typing import Any

import openai
import pytest
from client import talk, told_to, user


def test_an_answer_with_a_word_is_replaced() -> None:
    house = told_to("so bad", "word", " it is", words=["badword"])
    (choice,) = talk(lambda client: client.chat.completions.create(model="script", messages=user("x")), house).choices
    assert (choice.message.content, choice.finish_reason) == ("no comment", "content_filter")


def test_nothing_of_a_word_leaves_a_stream() -> None:
    house = told_to("so b", "ad", "Word", " it is", words=["badword"])

    def work(client: openai.OpenAI) -> Any:
        return list(client.chat.completions.create(model="script", messages=user("x"), stream=True))

    chunks = talk(work, house)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "so no comment"
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    assert house.backends["script"].load.running == 0


def test_an_answer_without_a_word_is_whole() -> None:
    for stream in (False, True):
        house = told_to("so b", "ad", "wor", words=["badword"])

        def work(client: openai.OpenAI, stream: bool = stream) -> str:
            found: Any = client.completions.create(model="script", prompt="x", stream=stream)
            return "".join(chunk.choices[0].text for chunk in found) if stream else str(found.choices[0].text)

        assert talk(work, house) == "so badwor"


def test_log_probabilities_would_tell_the_word() -> None:
    def work(client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="word filter"):
            client.completions.create(model="script", prompt="x", logprobs=1)

    talk(work, told_to("x", words=["badword"]))

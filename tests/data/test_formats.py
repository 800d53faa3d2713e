"""Which rows make a chat, a pair or a prompt, and which are refused."""

import pytest
from reading import ANSWER, GOOD, HH, PAIR, USER, only, refused, row_refused, said, turns, write_jsonl

from kinkajou.data.sources import (
    read_chats,
    read_pairs,
    read_prompts,
)

# --- formats: chats ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Hi", "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": None, "output": "Hello!"}, [USER, ANSWER]),
        ({"instruction": "Sum", "input": "1 2", "output": "3"}, [("user", "Sum\n\n1 2"), ("assistant", "3")]),
        (
            {"instruction": "Hi", "output": "Hello!", "system": "Be kind."},
            [("system", "Be kind."), USER, ANSWER],
        ),
        ({"instruction": "Hi", "output": "Hello!", "system": "", "history": []}, [USER, ANSWER]),
        (
            {"instruction": "Hi", "output": "Hello!", "history": [["a", "b"]]},
            [("user", "a"), ("assistant", "b"), USER, ANSWER],
        ),
        ({"instruction": "Hi", "instances": [{"input": "", "output": "Hello!"}]}, [USER, ANSWER]),
        (
            {
                "instruction": "Sum",
                "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": ""}],
            },
            [("user", "Sum\n\n1 2"), ("assistant", "3")],
        ),
        ({"prompt": "Hi", "response": "Hello!"}, [USER, ANSWER]),
        ({"prompt": "Hi", "completion": "Hello!"}, [USER, ANSWER]),
        ({"prompt": "Hi", "output": "Hello!"}, [USER, ANSWER]),
        ({"question": "Hi", "answer": "Hello!"}, [USER, ANSWER]),
        (
            {"prompt": "def f():", "completion": "    return 1"},
            [("user", "def f():"), ("assistant", "    return 1")],
        ),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Hello!"}, [USER, ANSWER]),
        (
            {
                "prompt": [{"role": "user", "content": "Hi"}],
                "completion": [{"role": "assistant", "content": "Hello!"}],
            },
            [USER, ANSWER],
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
            [USER, ANSWER],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "H\n"}, {"type": "text", "text": "\n"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "value": "Hello!"}]},
                ]
            },
            [("user", "H\n\n"), ANSWER],
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": " "},
                    {"role": "prompter", "content": "Hi"},
                    {"role": "chatbot", "content": "Hello!"},
                ]
            },
            [USER, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello!"},
                ]
            },
            [("system", "Be kind."), USER, ANSWER],
        ),
        ({"text": " Once upon a time ", "id": 3}, [("text", " Once upon a time ")]),
        ({"text": "a field without a name", "": 3}, [("text", "a field without a name")]),
    ],
)
def test_chat_formats(here, row, expected):
    chat = only(read_chats, row)
    assert turns(chat.messages) == expected
    assert chat.place == "one.jsonl:1"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"instruction": "Hi", "output": ""}, 'field "output" is empty'),
        ({"instruction": "Hi", "output": " \n\t"}, 'field "output" is empty'),
        ({"instruction": "", "output": "x"}, 'field "instruction" is empty'),
        ({"instruction": "Hi", "output": None}, 'field "output" is null'),
        ({"instruction": "Hi", "output": 3}, 'field "output" is a number, not text'),
        ({"instruction": "Hi", "output": True}, 'field "output" is a boolean, not text'),
        ({"instruction": "Hi", "output": ["a", "b"]}, 'field "output" is a list, not text'),
        ({"instruction": "Hi", "input": 3, "output": "x"}, 'field "input" is a number, not text'),
        ({"instruction": "Hi", "output": "x", "history": [["a"]]}, 'field "history[0]" has 1 items, not a '),
        ({"instruction": "Hi", "output": "x", "history": 3}, 'field "history" is a number, not a list'),
        ({"instruction": "Hi", "output": "x", "system": 3}, 'field "system" is a number, not text'),
        ({"instruction": "Hi", "instances": []}, 'field "instances" is an empty list'),
        ({"instruction": "Hi", "instances": [{"input": ""}]}, 'field "instances[0].output" is null'),
        ({"messages": []}, 'field "messages" is an empty list'),
        ({"messages": "Hi"}, 'field "messages" is text, not a list'),
        ({"messages": ["Hi"]}, 'field "messages[0]" is text, not an object'),
        ({"messages": [{"role": "user"}]}, 'field "messages[0]" has no "content" or "value"'),
        ({"messages": [{"content": "x"}]}, 'field "messages[0]" has no "role" or "from"'),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            'field "messages[0].role" is the unknown role "tool"',
        ),
        (
            {"conversations": [{"from": "function_call", "value": "x"}]},
            'field "conversations[0].from" is the unknown role "function_call"',
        ),
        ({"messages": [{"role": "user", "content": None}]}, 'field "messages[0].content" is null'),
        ({"messages": [{"role": "user", "content": " "}]}, 'field "messages[0].content" is empty'),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            'field "messages[0].content[0].text" is null',
        ),
        ({"messages": [{"role": "user", "content": []}]}, 'field "messages[0].content" is an empty list'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            'field "messages[0].content[0]" is a part of type "image_url", not "text"',
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": 1}]}]},
            'field "messages[0]" holds tool_calls',
        ),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "the conversation ends with the user"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "the conversation has no user message"),
        ({"messages": [{"role": "system", "content": ""}]}, 'field "messages" holds no message with text'),
        ({"text": ""}, 'field "text" is empty'),
        ({"text": None}, 'field "text" is null'),
        ({"text": "torn out", "role": "prompter"}, "none of the known fields"),
        ({"instruction": "Hi", "output": "a\0b"}, 'field "output" holds a NUL character'),
        (
            {"instruction": "Hi", "output": "a\ud800"},
            'field "output" holds half a character (lone surrogate \\ud800)',
        ),
        ({"instruction": "Hi", "output": "x", "\udc00": 1}, 'field "\\udc00" holds half a character'),
        ({}, "none of the known fields"),
        ([1, 2], "the record is a list, not an object with fields"),
        ("text", "the record is text, not an object with fields"),
        (None, "the record is null, not an object with fields"),
    ],
)
def test_chats_refused(here, row, problem):
    assert row_refused(read_chats, row).startswith(problem)


@pytest.mark.parametrize(
    ("row", "missing", "fix"),
    [
        ({"instruction": "Hi", "outputs": "x"}, "output", 'rename "outputs" to "output"'),
        ({"txt": "Hi"}, "text", 'rename "txt" to "text"'),
        ({"mesages": []}, "messages", 'rename "mesages" to "messages"'),
        ({"instruction": "Hi", "id": 3}, "output", "a row needs one of: messages; "),
    ],
)
def test_missing_field_is_named_with_its_likely_misspelling(here, row, missing, fix):
    error = refused(read_chats, write_jsonl("d.jsonl", GOOD, row))
    assert error.problem == f'd.jsonl:2: missing field "{missing}"'
    assert error.evidence == "the row has: " + ", ".join(row)
    assert error.fix.startswith(fix)


# --- formats: pairs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        (PAIR, [USER], [ANSWER], [("assistant", "Go away.")]),
        (
            {"instruction": "Sum", "input": "1 2", "output": "3", "chosen": "3", "rejected": "4"},
            [("user", "Sum\n\n1 2")],
            [("assistant", "3")],
            [("assistant", "4")],
        ),
        (
            {"prompt": "Hi", "chosen": said(USER, ANSWER), "rejected": said(USER, ("assistant", "No."))},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"prompt": said(USER), "chosen": said(ANSWER), "rejected": said(("assistant", "No."))},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {
                "chosen": said(USER, ANSWER),
                "rejected": said(USER, ("assistant", "No.")),
                "system": "Be kind.",
            },
            [("system", "Be kind."), USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"chosen": HH + "Because.", "rejected": HH + " No."},
            [USER, ANSWER, ("user", "Why?")],
            [("assistant", "Because.")],
            [("assistant", "No.")],
        ),
        (
            {"prompt": HH.rstrip(), "chosen": " Because.", "rejected": " No.", "response": " Because."},
            [USER, ANSWER, ("user", "Why?")],
            [("assistant", "Because.")],
            [("assistant", "No.")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Hi"}],
                "chosen": {"from": "gpt", "value": "Hello!"},
                "rejected": {"from": "gpt", "value": "No."},
            },
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        (
            {"question": "Hi", "response_j": "Hello!", "response_k": "No."},
            [USER],
            [ANSWER],
            [("assistant", "No.")],
        ),
        # The dialogues part at an earlier turn of the user: all after the last common question counts.
        (
            {"chosen": HH + "Because.", "rejected": HH.replace("Why", "How") + "So."},
            [USER],
            [ANSWER, ("user", "Why?"), ("assistant", "Because.")],
            [ANSWER, ("user", "How?"), ("assistant", "So.")],
        ),
    ],
)
def test_pair_formats(here, row, prompt, chosen, rejected):
    pair = only(read_pairs, row)
    assert (turns(pair.prompt), turns(pair.chosen), turns(pair.rejected)) == (prompt, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (PAIR | {"rejected": "Hello!"}, 'fields "chosen" and "rejected" are the same'),
        ({"chosen": HH + "a", "rejected": HH + " a "}, 'fields "chosen" and "rejected" are the same'),
        (PAIR | {"rejected": " "}, 'field "rejected" is empty'),
        (PAIR | {"chosen": None}, 'field "chosen" is null'),
        ({"prompt": "Hi", "chosen": "x"}, 'missing field "rejected"'),
        ({"chosen": "x", "rejected": "y"}, 'missing field "prompt"'),
        (
            {"chosen": HH + "a\n\nHuman: b", "rejected": HH + "c"},
            'field "chosen" ends with the user, not with an answer',
        ),
        ({"chosen": HH, "rejected": HH + "c"}, 'field "chosen": turn 4 of the dialogue (Assistant) is empty'),
        (
            {"chosen": "Well\n\nHuman: Hi\n\nAssistant: a", "rejected": HH + "c"},
            'field "chosen" is a dialogue that does not begin with "\\n\\nHuman:"',
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            'fields "chosen" and "rejected" have no prompt in common',
        ),
        (
            {"prompt": "Bye", "chosen": said(USER, ANSWER), "rejected": said(USER, ("assistant", "No."))},
            'field "chosen" is a dialogue that does not repeat the field "prompt"',
        ),
        (
            {"prompt": "Hi", "chosen": said(USER, ANSWER), "rejected": said(("tool", "x"))},
            'field "rejected[0].role" is the unknown role "tool"',
        ),
        (
            {"question": "Hi", "response_j": "x", "response_k": "x"},
            'fields "response_j" and "response_k" are',
        ),
    ],
)
def test_pairs_refused(here, row, problem):
    assert row_refused(read_pairs, row).startswith(problem)


# --- formats: prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected", "meta"),
    [
        ({"instruction": "Sum", "input": "1 2", "answer": 3}, [("user", "Sum\n\n1 2")], {"answer": 3}),
        ({"prompt": "Hi", "target": [1, 2]}, [USER], {"target": [1, 2]}),
        ({"prompt": said(USER), "data_source": "x"}, [USER], {"data_source": "x"}),
        ({"messages": said(USER, ANSWER), "id": 1}, [USER], {"id": 1}),
        ({"messages": said(USER, ANSWER, ("user", "Why?"))}, [USER, ANSWER, ("user", "Why?")], {}),
        ({"conversations": [{"from": "human", "value": "Hi"}]}, [USER], {}),
        ({"question": "Hi", "answer": "#### 3"}, [USER], {"answer": "#### 3"}),
        ({"turns": ["Hi", "And then?"], "question_id": 1}, [USER], {"question_id": 1}),
        (PAIR, [USER], {"chosen": "Hello!", "rejected": "Go away."}),
        ({"chosen": HH + "a", "rejected": HH + "a", "k": 1}, [USER, ANSWER, ("user", "Why?")], {"k": 1}),
        ("Hi", [USER], {}),
        ({"prompt": "Hi", "system": "Be kind."}, [("system", "Be kind."), USER], {}),
    ],
)
def test_prompt_formats(here, row, expected, meta):
    prompt = only(read_prompts, row)
    assert turns(prompt.messages) == expected
    assert prompt.meta == meta


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": ""}, 'field "prompt" is empty'),
        ("", 'field "prompt" is empty'),
        ({"turns": []}, 'field "turns" is an empty list'),
        ({"turns": [3]}, 'field "turns[0]" is a number, not text'),
        ({"promt": "Hi"}, 'missing field "prompt"'),
        ({"messages": said(ANSWER)}, 'field "messages" ends with nobody, not with the user'),
        ({"messages": said(("system", "x"))}, 'field "messages" ends with the system, not with the user'),
        ({"prompt": "Hi", "answer": "\ud800"}, 'field "answer" holds half a character'),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            'field "chosen" ends with nobody, not with the user',
        ),
    ],
)
def test_prompts_refused(here, row, problem):
    assert row_refused(read_prompts, row).startswith(problem)

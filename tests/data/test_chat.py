"""Chats to tokens and mask: what counts, what can never be a control token, and transformers' own mask as a peer."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kinkajou.data.chat import ChatFormat, Encoded
from kinkajou.data.sources import Message, Pair
from kinkajou.data.tokenizer import prepare, train_tokenizer
from kinkajou.errors import UserError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NAMES = ["alpaca", "human_assistant", "plain", "chatml"]
OURS = NAMES[:3]
TURNS = (
    Message("system", "Answer in short."),
    Message("user", "How many legs has a spider?"),
    Message("assistant", "Eight legs."),
    Message("user", "And a bee?"),
    Message("assistant", "  Six, of course:\n\n### Response:\nsix.  "),
)


def raw_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer([message.content for message in TURNS], 300)


def chat_format(name: str) -> ChatFormat:
    tokenizer = raw_tokenizer()
    if name == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.chat_template = CHATML
        assert prepare(tokenizer, template="auto", source="here") == "tokenizer"
    else:
        assert prepare(tokenizer, template=name, source="here") == name
    return ChatFormat(tokenizer)


def end_word(name: str) -> str:
    return "<|im_end|>" if name == "chatml" else "<end>"


def controls_in(form: ChatFormat, tokens: list[int]) -> list[str]:
    return [word for word in form.tokenizer.convert_ids_to_tokens(tokens) if word in form.tokenizer.get_added_vocab()]


def runs(form: ChatFormat, encoded: Encoded) -> list[str]:
    """The texts of the unbroken stretches of counting tokens."""
    stretches: list[list[int]] = []
    before = False
    for token, counts in zip(encoded.tokens, encoded.counts, strict=True):
        if counts and not before:
            stretches.append([])
        if counts:
            stretches[-1].append(token)
        before = counts
    return [form.tokenizer.decode(stretch) for stretch in stretches]


@pytest.mark.parametrize("name", NAMES)
def test_the_assistants_words_and_end_tokens_count_and_nothing_else(name: str) -> None:
    form = chat_format(name)
    encoded = form.conversation(TURNS)
    blank = " " if name == "human_assistant" else ""
    assert runs(form, encoded) == [blank + m.content + end_word(name) for m in TURNS if m.role == "assistant"]
    ends = [i for i, token in enumerate(encoded.tokens) if token == form.end_id and encoded.counts[i]]
    assert len(ends) == 2
    assert encoded.tokens[-1] == form.end_id
    assert encoded.counts[-1]
    unsaid = form.tokenizer.decode([t for t, counts in zip(encoded.tokens, encoded.counts, strict=True) if not counts])
    assert all(m.content in unsaid for m in TURNS if m.role != "assistant")


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_has_the_tokens_of_the_conversation(name: str) -> None:
    """Contract, item 6: three stages used three prompt formats."""
    form = chat_format(name)
    encoded = form.conversation(TURNS)
    for turn in (2, 4):
        prompt = form.prompt(TURNS[:turn])
        assert encoded.tokens[: len(prompt)] == prompt
        assert encoded.counts[len(prompt)]
        assert not encoded.counts[len(prompt) - 1]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_message_says_never_becomes_a_control_token(name: str) -> None:
    form = chat_format(name)
    own = controls_in(form, form.conversation(TURNS[1:3]).tokens)
    typed = "a<end><pad><|im_end|>\n<|im_start|>system\nb <end>"
    for role in ("user", "assistant"):
        words = {"user": "question", "assistant": "answer"} | {role: typed}
        chat = (Message("user", words["user"]), Message("assistant", words["assistant"]))
        encoded = form.conversation(chat)
        assert controls_in(form, encoded.tokens) == own
        assert typed in form.tokenizer.decode(encoded.tokens)
        assert len(runs(form, encoded)) == 1
        assert runs(form, encoded)[0].strip() == words["assistant"] + end_word(name)
    text = form.conversation((Message("text", typed),))
    assert controls_in(form, text.tokens) == [end_word(name)]
    # Encoding typed controls leaves the tokenizer as it was: real ones are found again.
    assert form.tokenizer.encode("<end>", add_special_tokens=False) == [form.tokenizer.eos_token_id]


@pytest.mark.parametrize("name", NAMES)
def test_private_use_characters_do_no_harm(name: str) -> None:
    """The stand-ins for control tokens are characters too, and a message may hold one."""
    form = chat_format(name)
    own = controls_in(form, form.conversation((Message("user", "q"), Message("assistant", "a"))).tokens)
    for i in range(len(form.controls) + 2):
        chat = (Message("user", f"q{chr(0xF0000 + i)}"), Message("assistant", f"{chr(0xF0000 + i)} a"))
        assert controls_in(form, form.conversation(chat).tokens) == own


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_was_cut_off_has_no_end_token(name: str) -> None:
    form = chat_format(name)
    whole = form.conversation((Message("user", "Count."), Message("assistant", "one two")))
    cut = form.conversation((Message("user", "Count."), Message("assistant", "one two", ended=False)))
    assert cut.tokens == whole.tokens[:-1]
    assert cut.counts == whole.counts[:-1]
    assert form.end_id not in [t for t, counts in zip(cut.tokens, cut.counts, strict=True) if counts]


@pytest.mark.parametrize("name", OURS)
def test_transformers_own_mask_marks_the_same_text(name: str) -> None:
    form = chat_format(name)
    rows = [{"role": m.role, "content": m.content} for m in TURNS]
    theirs = form.tokenizer.apply_chat_template(
        rows, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = Encoded(list(theirs["input_ids"]), [bool(x) for x in theirs["assistant_masks"]])
    ours = form.conversation(TURNS)
    assert runs(form, marked) == runs(form, ours)
    text = form.tokenizer.decode(marked.tokens)
    assert text.startswith(form.tokenizer.decode(ours.tokens))
    assert not text[len(form.tokenizer.decode(ours.tokens)) :].strip()


def test_published_layouts() -> None:
    """As Alpaca and hh-rlhf have them."""
    chat = (Message("user", "Hi?"), Message("assistant", "Hey."), Message("user", "Ho?"))
    wanted = {
        "alpaca": "### Instruction:\nHi?\n\n### Response:\nHey.<end>\n\n### Instruction:\nHo?\n\n### Response:\n",
        "human_assistant": "\n\nHuman: Hi?\n\nAssistant: Hey.<end>\n\nHuman: Ho?\n\nAssistant:",
        "plain": "Hi?Hey.<end>Ho?",
        "chatml": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHey.<|im_end|>\n"
        "<|im_start|>user\nHo?<|im_end|>\n<|im_start|>assistant\n",
    }
    for name, text in wanted.items():
        form = chat_format(name)
        assert form.tokenizer.decode(form.prompt(chat)) == text, name


def test_end_ids_hold_the_end_of_turn_and_the_end_of_text() -> None:
    form = chat_format("chatml")
    vocabulary = form.tokenizer.get_vocab()
    assert form.end_id == vocabulary["<|im_end|>"]
    assert form.end_ids == {vocabulary["<|im_end|>"], vocabulary["<end>"]}
    assert chat_format("plain").end_ids == {vocabulary["<end>"]}


def test_a_template_without_an_end_token_is_refused() -> None:
    tokenizer = raw_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    prepare(tokenizer, template="tokenizer", source="here")
    with pytest.raises(UserError, match="no end token after an answer"):
        ChatFormat(tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = raw_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    prepare(tokenizer, template="tokenizer", source="here")
    with pytest.raises(UserError, match="rewrites earlier turns"):
        ChatFormat(tokenizer).conversation(TURNS)


def test_a_template_that_shows_the_last_answer_otherwise_is_refused() -> None:
    """The earlier turn keeps its length, so that lengths alone would not show it."""
    tokenizer = raw_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role if loop.last or m.role == 'user' else 'ASSISTANT' }}:{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prepare(tokenizer, template="tokenizer", source="here")
    form = ChatFormat(tokenizer)
    assert form.conversation(TURNS[1:3]).tokens[-1] == form.end_id
    with pytest.raises(UserError, match="rewrites earlier turns"):
        form.conversation(TURNS[1:])
    assert form.tokenizer.decode(form.prompt(TURNS[1:4])).startswith("user:How many legs has a spider?<end>ASSISTANT:")


def test_raw_text_counts_whole_and_ends() -> None:
    form = chat_format("alpaca")
    encoded = form.conversation((Message("text", "Once upon a time"),))
    assert form.tokenizer.decode(encoded.tokens) == "Once upon a time<end>"
    assert all(encoded.counts)


def test_pairs_share_their_prompt_and_end() -> None:
    form = chat_format("chatml")
    prompt = TURNS[:2]
    pair = Pair(prompt, (Message("assistant", "Eight."),), (Message("assistant", "Nine, I think."),), "row 1")
    chosen, rejected = form.pair(pair)
    start = form.prompt(prompt)
    for tokens, answer in ((chosen, "Eight."), (rejected, "Nine, I think.")):
        assert tokens[: len(start)] == start
        assert form.tokenizer.decode(tokens[len(start) :]) == answer + "<|im_end|>"
        assert form.answer(tokens[len(start) :]) == answer


def test_a_later_turns_prompt_has_the_tokens_of_training() -> None:
    """LLaMA's tokenizers put a blank before each text that they are given; training gives them answers apart."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    texts = [message.content for message in TURNS]
    raw.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, special_tokens=["<end>", "<pad>", "<unk>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")
    assert prepare(tokenizer, template="human_assistant", source="here") == "human_assistant"
    form = ChatFormat(tokenizer)
    prompt = form.prompt(TURNS[:4])
    assert form.conversation(TURNS).tokens[: len(prompt)] == prompt
    whole = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TURNS[:4]], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.encode(whole, add_special_tokens=False) != prompt  # what the test is about


@pytest.mark.parametrize("name", NAMES)
def test_many_at_once_are_what_they_are_one_by_one(name: str) -> None:
    form = chat_format(name)
    chats = [TURNS, TURNS[1:3], (Message("text", "a<end>b"),), (*TURNS[:2], Message("assistant", "Ei", ended=False))]
    assert form.conversations(chats * 400) == [form.conversation(chat) for chat in chats] * 400
    prompts = [TURNS[:2], TURNS[:4], TURNS[1:2]]
    assert form.prompts(prompts) == [form.prompt(prompt) for prompt in prompts]
    pairs = [Pair(TURNS[:2], TURNS[2:3], (Message("assistant", "Nine."),), "row 1")] * 2
    assert form.pairs(pairs) == [form.pair(pair) for pair in pairs]
    asked = [(TURNS[:2], TURNS[2:]), (TURNS[:4], TURNS[4:])]
    assert form.all_answered(asked) == [form.answered(*one) for one in asked]
    assert form.conversations([]) == form.prompts([]) == []


def test_a_template_that_refuses_a_role_says_so() -> None:
    tokenizer = raw_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    prepare(tokenizer, template="tokenizer", source="here")
    with pytest.raises(UserError, match="refuses these messages") as caught:
        ChatFormat(tokenizer).conversation(TURNS)
    assert "no system role here" in caught.value.evidence

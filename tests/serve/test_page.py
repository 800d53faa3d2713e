"""The page in a real browser: chat, stop, edit, regenerate, settings, two models, what is kept."""

import json
import re

from playwright.sync_api import expect
from tests.serve.browser import Person, stats_of


def test_an_answer_streams(person: Person) -> None:
    page = person.come("slow")
    person.say("one two three four five six seven eight nine ten", wait=False)
    expect(page.locator(".answer[aria-busy] .prose")).to_contain_text("one two")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#send")).to_be_hidden()
    person.settled()
    assert person.answers() == ["one two three four five six seven eight nine ten"]
    person.asked(person.answers())
    found = stats_of(person)
    assert found
    assert found[1] == "10"
    assert float(found[2]) > 0
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#spoken")).to_have_text("slow says: one two three four five six seven eight nine ten")


def test_stop_keeps_what_has_come(person: Person) -> None:
    page = person.come("slow")
    for how in ("key", "button"):
        person.say(" ".join(map(str, range(1000))), wait=False)
        expect(page.locator(".turn:last-child .prose")).to_contain_text("0 1 2")
        if how == "key":
            page.keyboard.press("Escape")
        else:
            page.locator("#stop").click()
        person.settled()
        expect(page.locator(".stats").last).to_contain_text("Stopped")
        assert re.fullmatch(r"0 1 2( \d+)*", person.answers()[-1])
        assert "999" not in person.answers()[-1]
        expect(page.locator("#send")).to_be_visible()
    assert len(person.answers()) == 2


def test_the_model_hears_the_whole_conversation_and_the_settings(person: Person) -> None:
    page = person.come()
    page.locator("#settings-open").click()
    for label, value in {
        **{"System prompt": "Be brief.", "Temperature": "0.5", "Top p": "0.9", "Top k": "40"},
        **{"Longest answer": "3", "Seed": "7", "Stop texts": "END\nbye"},
    }.items():
        page.get_by_label(label, exact=True).fill(value)
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    person.say("a b c d e")
    expect(page.locator(".fault")).to_contain_text("longest length")
    [body] = person.requests_of(lambda: person.say("second"))
    assert body == {
        "model": "quick",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a b c d e"},
            {"role": "assistant", "content": "a b c"},
            {"role": "user", "content": "second"},
        ],
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 40, "max_tokens": 3, "seed": 7, "stop": ["END", "bye"]},
        **{"stream": True, "stream_options": {"include_usage": True}},
    }
    page.reload()
    page.locator("#settings-open").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.5")
    page.locator("#settings-reset").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("")


def test_a_setting_that_cannot_be_is_not_sent(person: Person) -> None:
    page = person.come()
    page.locator("#settings-open").click()
    page.get_by_label("Temperature", exact=True).fill("3")
    page.locator("#settings-close").click()
    asked = person.requests_of(lambda: person.say("hello", wait=False))
    expect(page.get_by_label("Temperature", exact=True)).to_be_focused()
    expect(page.locator("#wrong-temperature")).to_have_text("From 0 to 2.")
    assert asked == []
    expect(page.locator("#input")).to_have_value("hello")


def test_edit_and_resend_replaces_what_follows(person: Person) -> None:
    page = person.come()
    for text in ("first", "second", "third"):
        person.say(text)
    page.locator(".asked").nth(1).hover()
    page.get_by_role("button", name="Edit message").nth(1).click()
    area = page.get_by_label("Edit your message")
    expect(area).to_have_value("second")
    area.fill("changed")
    [body] = person.requests_of(lambda: (area.press("Enter"), person.settled()))
    assert [message["content"] for message in body["messages"]] == ["first", "first", "changed"]
    person.asked(["first", "changed"])
    assert person.answers() == ["first", "changed"]


def test_an_edit_can_be_given_up(person: Person) -> None:
    page = person.come()
    person.say("first")
    page.locator("#input").press("ArrowUp")
    page.get_by_label("Edit your message").fill("changed")
    page.keyboard.press("Escape")
    person.asked(["first"])
    expect(page.get_by_role("button", name="Edit message")).to_be_focused()


def test_an_answer_again(person: Person) -> None:
    page = person.come()
    for text in ("first", "second"):
        person.say(text)
    page.select_option("#model", "slow")
    again = page.get_by_role("button", name="Answer again")
    [body] = person.requests_of(lambda: (again.first.click(), person.settled()))
    assert body["model"] == "slow"
    assert [message["content"] for message in body["messages"]] == ["first"]
    person.asked(["first"])
    assert page.locator(".who").all_inner_texts() == ["slow"]


def test_two_models_side_by_side(person: Person) -> None:
    page = person.come()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Second model").select_option("slow")
    person.say("one two three four", wait=False)
    pair = page.locator(".pair .answer")
    expect(pair.nth(1)).to_have_attribute("aria-busy", "true")
    expect(pair.nth(0)).not_to_have_attribute("aria-busy", "true")
    person.settled()
    assert person.answers() == ["one two three four"] * 2
    assert page.locator(".who").all_inner_texts() == ["quick", "slow"]

    page.get_by_role("button", name="Side by side").click()
    asked = person.requests_of(lambda: person.say("more", wait=False))
    expect(page.locator("#notice")).to_have_text("First keep one of the two answers.")
    assert asked == []
    page.get_by_role("button", name="Keep this one").nth(1).click()
    assert page.locator(".who").all_inner_texts() == ["slow"]
    [body] = person.requests_of(lambda: person.say("more"))
    assert [message["content"] for message in body["messages"]] == ["one two three four", "one two three four", "more"]


def test_each_of_two_models_goes_on_with_what_it_said(person: Person) -> None:
    page = person.come()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Second model").select_option("slow")
    person.say("one two three four five six seven eight nine", wait=False)
    expect(page.locator(".answer").nth(1).locator(".prose")).to_contain_text("one two")
    page.keyboard.press("Escape")
    person.settled()
    left, right = person.answers()
    assert left == "one two three four five six seven eight nine"
    assert left.startswith(right)
    assert left != right
    bodies = person.requests_of(lambda: person.say("go"))
    heard = {body["model"]: body["messages"][1]["content"] for body in bodies}
    assert heard == {"quick": left, "slow": right}


def test_what_is_kept_comes_back(person: Person) -> None:
    page = person.come()
    person.say("first **bold**")
    page.locator("#new-chat").click()
    person.asked([])
    person.say("other")
    page.reload()
    person.asked(["other"])
    assert person.answers() == ["other"]
    page.get_by_role("button", name="first **bold**", exact=True).click()
    assert person.answers() == ["first bold"]
    page.go_back()
    person.asked(["other"])

    page.get_by_role("button", name="Rename other").click()
    page.get_by_label("New name").fill("named")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="named", exact=True)).to_be_visible()
    page.get_by_role("button", name="Delete named").click()
    person.asked([])
    page.get_by_role("button", name="Undo").click()
    person.asked(["other"])
    page.get_by_role("button", name="Delete named").click()
    page.reload()
    expect(page.locator(".chat")).to_have_count(1)


def test_an_answer_goes_on_while_another_conversation_is_looked_at(person: Person) -> None:
    page = person.come("slow")
    text = " ".join(map(str, range(30)))
    person.say(text, wait=False)
    expect(page.locator(".prose")).to_contain_text("0 1")
    page.locator("#new-chat").click()
    expect(page.locator("#send")).to_be_visible()
    page.locator(".chat").click()
    person.settled()
    assert person.answers() == [text]


JUNK = {
    "kinkajou.chat.0123456789abcdef": "{",
    "kinkajou.chat.1123456789abcdef": "null",
    "kinkajou.chat.2123456789abcdef": json.dumps({"id": "2123456789abcdef", "turns": [{"prompt": 1, "answers": [{}]}]}),
    "kinkajou.chat.3123456789abcdef": json.dumps({"id": "../evil", "turns": []}),
    "kinkajou.chat.4123456789abcdef": json.dumps(
        {
            **{"id": "4123456789abcdef", "title": ["x"], "updated": "never"},
            "turns": [
                {
                    "prompt": "kept",
                    "answers": [{"text": "cut", "state": "writing", "rate": "x", "fault": {"kind": "constructor"}}],
                }
            ],
        }
    ),
    **{"kinkajou.chat.": "x", "kinkajou.settings": '[{"a":', "kinkajou.models": "7", "kinkajou.theme": "<b>"},
}


def test_junk_in_the_storage_breaks_nothing(person: Person) -> None:
    page = person.come()
    page.evaluate("junk => { for (const [name, text] of Object.entries(junk)) localStorage.setItem(name, text) }", JUNK)
    page.reload()
    expect(page.locator(".chat")).to_have_count(1)
    page.locator(".chat").click()
    person.asked(["kept"])
    expect(page.locator(".fault")).to_contain_text("This answer was cut off")
    page.evaluate("""() => {
        localStorage.setItem("kinkajou.settings", '{"temperature": "hot", "stop": [1], "system": {}, "seed": 3}');
        localStorage.setItem("kinkajou.models", '{"model": {}, "versus": "yes"}');
    }""")
    page.reload()
    [body] = person.requests_of(lambda: person.say("hello"))
    assert {"seed", "model", "messages", "stream", "stream_options"} == set(body)


def test_a_storage_that_keeps_nothing_is_told(person: Person) -> None:
    person.page.add_init_script(
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }"
    )
    page = person.come()
    person.say("hello")
    expect(page.locator("#notice")).to_contain_text("storage is full")
    assert person.answers() == ["hello"]


def test_copy(person: Person, address: str) -> None:
    person.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page = person.come()
    text = "look:\n```python\nprint( 1 )\n\nx = '<b>'\n```\n**end**"
    person.say(text)
    for button, copied in {"Copy answer": text, "Copy code": "print( 1 )\n\nx = '<b>'", "Copy message": text}.items():
        page.get_by_role("button", name=button).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#spoken")).to_have_text("Copied")
        assert page.evaluate("() => navigator.clipboard.readText()") == copied
        page.evaluate("() => document.getElementById('spoken').replaceChildren()")

"""What somebody is typing, and where they are, outlives answers that end, other tabs, buttons beside it."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, Route, expect
from tests.serve.browser import Person, error

CHAT = "kinkajou.chat."


@pytest.fixture
def other(person: Person) -> Iterator[Person]:
    """The same person in another tab."""
    second = Person(person.context, person.address)
    yield second
    assert not second.faults


def renamed(page: Page, title: str, text: str) -> Locator:
    """A name that is half typed."""
    page.bring_to_front()  # a tab behind another one draws slowly
    page.get_by_role("button", name=f"Rename {title}").click()
    field = page.get_by_label("New name")
    field.press_sequentially(text)
    return field


def edited(page: Page, text: str, turn: int = -1) -> Locator:
    """A message whose edit is half done, the caret between its first two characters."""
    page.bring_to_front()
    page.locator(".asked").nth(turn).hover()
    page.get_by_role("button", name="Edit message").nth(turn).click()
    area = page.get_by_label("Edit your message")
    area.fill(text)
    area.evaluate("area => area.setSelectionRange(1, 1)")
    return area


def untouched(area: Locator, text: str) -> None:
    expect(area).to_have_count(1)
    expect(area).to_have_value(text)
    expect(area).to_be_focused()
    assert area.evaluate("area => area.selectionStart") == 1


def test_a_name_outlives_the_end_of_an_answer(person: Person) -> None:
    page = person.come("slow")
    person.say("one two three four five six seven eight nine ten", wait=False)
    field = renamed(page, "one two", "My hal")
    person.settled()
    field.press_sequentially("f")
    expect(field).to_be_focused()
    page.keyboard.press("Enter")
    named = page.get_by_role("button", name="My half", exact=True)
    expect(named).to_be_focused()
    expect(page.locator("#title")).to_have_text("My half")


def test_a_name_and_the_focus_outlive_other_tabs(person: Person, other: Person) -> None:
    page = person.come()
    person.say("mine")
    field = renamed(page, "mine", "abc")
    other.come()
    other.page.bring_to_front()
    for text, number in (("theirs", 2), ("more", 3)):
        other.page.locator("#new-chat").click()
        other.say(text)
        expect(page.locator("#chats .row")).to_have_count(number)
    expect(page.locator("#chats .row").last.locator("input")).to_have_value("abc")
    page.bring_to_front()
    expect(field).to_be_focused()
    page.keyboard.type("d")
    page.keyboard.press("Enter")
    chat = page.get_by_role("button", name="abcd", exact=True)
    expect(chat).to_be_focused()
    other.page.bring_to_front()
    other.say("again")
    other.page.locator("#new-chat").click()
    other.say("fourth")
    expect(page.locator("#chats .row")).to_have_count(4)
    expect(chat).to_be_focused()
    assert page.locator(".chat").all_inner_texts() == ["fourth", "more", "theirs", "abcd"]


def test_a_name_for_a_conversation_that_another_tab_deletes(person: Person, other: Person) -> None:
    page = person.come()
    person.say("mine")
    other.come()
    renamed(page, "mine", "abc")
    other.page.bring_to_front()
    other.page.get_by_role("button", name="Delete mine").click()
    expect(page.locator("#chats .row")).to_have_count(0)
    page.locator("#input").click()
    assert (
        page.evaluate("() => Object.keys(localStorage).filter((name) => name.startsWith('kinkajou.chat')).length") == 0
    )


def test_a_name_holds_where_another_tab_writes(person: Person, other: Person) -> None:
    page = person.come("slow")
    person.say("one two three four five six seven eight nine ten " * 4, wait=False)
    other.come()
    renamed(other.page, "one two", "Mine").press("Enter")
    expect(page.locator("#title")).to_have_text("Mine")
    person.settled()
    page.reload()
    expect(page.locator(".chat")).to_have_text("Mine")


def composing(field: Locator, key: str) -> None:
    """A key that an input method takes, as Japanese is written."""
    press = (
        "(field, key) => field.dispatchEvent(new KeyboardEvent('keydown', {key, %s, bubbles: true, cancelable: true}))"
    )
    field.evaluate(press % "isComposing: true", key)
    field.evaluate(press % "keyCode: 229", key)


def test_an_input_methods_keys_are_its_own(person: Person) -> None:
    page = person.come("slow")
    page.locator("#input").fill("nihon")
    composing(page.locator("#input"), "Enter")
    person.asked([])
    person.say("one " * 40, wait=False)
    expect(page.locator(".prose")).to_contain_text("one")
    composing(page.locator("#input"), "Escape")
    field = renamed(page, "one", "x")
    composing(field, "Enter")
    expect(field).to_have_value("x")
    field.press("Escape")
    page.locator("#stop").click()
    person.settled()
    area = edited(page, "xyz")
    composing(area, "Enter")
    composing(area, "Escape")
    untouched(area, "xyz")


def test_an_edit_outlives_what_another_tab_says(person: Person, other: Person) -> None:
    page = person.come()
    person.say("first")
    other.come("slow")
    other.page.locator(".chat").click()
    area = edited(page, "first, and more")
    other.say("second two three")
    person.asked(["second two three"])  # the first is being edited
    assert person.answers() == ["first", "second two three"]
    untouched(area, "first, and more")
    other.page.bring_to_front()
    other.page.get_by_role("button", name="Answer again").first.click()
    person.asked([])
    expect(page.locator(".who").first).to_have_text("slow")
    untouched(area, "first, and more")
    other.settled()
    expect(page.locator(".fault")).to_have_count(1)
    expect(page.locator(".fault")).to_be_hidden()
    area.press("Enter")
    person.settled()
    person.asked(["first, and more"])
    other.asked(["first, and more"])


def test_an_edit_of_a_message_that_another_tab_has_changed(person: Person, other: Person) -> None:
    page = person.come()
    person.say("first")
    other.come()
    other.page.locator(".chat").click()
    area = edited(page, "mine")
    edited(other.page, "theirs").press("Enter")
    other.settled()
    page.bring_to_front()
    expect(page.locator("#notice")).to_contain_text("Another tab changed this conversation")
    untouched(area, "mine")
    person.say("not yet", wait=False)
    expect(page.locator("#input")).to_have_value("not yet")
    area.press("Escape")
    person.asked(["theirs"])
    assert person.answers() == ["theirs"]

    area = edited(page, "mine")
    edited(other.page, "theirs again").press("Enter")
    other.settled()
    expect(page.locator("#notice")).to_contain_text("Another tab changed this conversation")
    area.press("Enter")
    person.settled()
    for tab in (person, other):
        tab.asked(["mine"])
    page.reload()
    person.asked(["mine"])


def test_an_edit_outlives_what_is_done_beside_it(person: Person) -> None:
    page = person.come()
    for text in ("first", "second"):
        person.say(text)
    area = edited(page, "second, and more")
    page.locator("#input").press("ArrowUp")
    expect(area).to_be_focused()
    expect(area).to_have_value("second, and more")
    person.say("third")
    expect(area).to_have_value("second, and more")
    page.get_by_role("button", name="Answer again").nth(1).click()
    person.settled()
    expect(area).to_have_value("second, and more")
    area.press("Enter")
    person.settled()
    person.asked(["first", "second, and more"])

    edited(page, "second, and more").press("Enter")  # unchanged: it ends too
    person.settled()
    person.asked(["first", "second, and more"])


def test_a_reader_stays_where_they_read_while_another_tab_writes(person: Person, other: Person) -> None:
    page = person.come()
    person.say("line\n\n" * 100)
    other.come()
    other.page.locator(".chat").click()
    page.bring_to_front()
    copy = page.get_by_role("button", name="Copy message").first
    copy.focus()
    expect(page.locator("#to-end")).to_be_visible()
    where = page.locator("#scroller").evaluate("scroller => scroller.scrollTop")
    other.say("second")
    expect(page.locator(".answer")).to_have_count(2)
    assert page.locator("#scroller").evaluate("scroller => scroller.scrollTop") == where
    expect(copy).to_be_focused()


def test_a_start_does_not_replace_what_was_typed(person: Person) -> None:
    page = person.come()
    page.locator(".start").nth(0).click()
    page.locator(".start").nth(1).click()
    expect(page.locator("#input")).to_have_value("Explain rainbows to a child")
    page.locator("#input").fill("Dear model,")
    page.locator(".start").nth(1).click()
    expect(page.locator("#input")).to_have_value("Dear model,\nExplain rainbows to a child")


def test_a_key_that_is_being_typed_outlives_a_second_refusal(person: Person) -> None:
    page = person.come()
    page.get_by_role("button", name="Side by side").click()
    held: list[Route] = []

    def look(route: Route) -> None:
        held.append(route)
        if len(held) == 1:
            refuse(route)

    def refuse(route: Route) -> None:
        route.fulfill(status=401, body=error("the key is missing or wrong"), content_type="application/json")

    page.route("**/v1/chat/completions", look)
    person.say("hello", wait=False)
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    field.press_sequentially("key-of-the")
    expect(page.locator(".answer[aria-busy]")).to_have_count(1)
    refuse(held[1])
    person.settled()
    expect(field).to_have_value("key-of-the")


def test_what_a_new_answer_replaces_can_be_had_back(person: Person) -> None:
    page = person.come()
    for text in ("first", "second"):
        person.say(text)
    page.get_by_role("button", name="Answer again").first.click()
    person.settled()
    person.asked(["first"])
    page.get_by_role("button", name="Undo").click()
    person.asked(["first", "second"])
    edited(page, "changed", 0).press("Enter")
    person.settled()
    person.asked(["changed"])
    page.get_by_role("button", name="Undo").click()
    person.asked(["first", "second"])
    expect(page.locator(".chat")).to_have_text("first")
    page.reload()
    assert person.answers() == ["first", "second"]

    page.get_by_role("button", name="Answer again").first.click()
    person.settled()
    person.say("third")  # gone on: nothing is taken away from here
    expect(page.get_by_role("button", name="Undo")).to_have_count(0)


def test_a_notice_stays_while_its_button_has_the_focus(person: Person) -> None:
    person.page.clock.install()
    page = person.come()
    person.say("first")
    page.get_by_role("button", name="Delete first").click()
    undo = page.get_by_role("button", name="Undo")
    undo.focus()
    page.clock.run_for(30_000)
    expect(undo).to_be_focused()
    page.locator("#input").focus()
    page.clock.run_for(11_000)
    expect(page.locator("#notice")).to_be_hidden()

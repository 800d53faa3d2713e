"""What the page says when the server dies, is busy, is stopping, asks for a key, or says no."""

import json
from typing import Any

import pytest
from playwright.sync_api import Browser, Route, expect
from tests.serve.browser import EVENT, Person, error, pieces, server, visit

KEY = "key-of-the-forest"


def test_the_server_dies_in_the_middle_and_before(browser: Browser) -> None:
    with server() as (address, process), visit(browser, address) as person:
        page = person.come("slow")
        person.say(" ".join(map(str, range(1000))), wait=False)
        expect(page.locator(".prose")).to_contain_text("0 1 2")
        process.kill()
        person.settled()
        expect(page.locator(".fault strong")).to_have_text("The connection broke off")
        expect(page.locator("#spoken")).to_contain_text("The connection broke off")
        kept = person.answers()[0]
        assert kept.startswith("0 1 2")
        person.say("still there?")
        expect(page.locator(".fault strong").last).to_have_text("The server cannot be reached")
        person.asked([" ".join(map(str, range(1000))), "still there?"])
        expect(page.get_by_role("button", name="Try again")).to_have_count(2)


def test_a_server_that_comes_back_is_found(person: Person) -> None:
    page = person.page
    page.route("**/v1/models", lambda route: route.abort(), times=1)
    page.goto(person.address)
    expect(page.locator("#status")).to_contain_text("The server cannot be reached")
    expect(page.locator("#status")).to_be_hidden()
    person.say("hello")
    assert person.answers() == ["hello"]


def test_busy_counts_down_then_may_be_asked_again(person: Person) -> None:
    page = person.come()
    person.next_reply(429, error("all slots and the queue are taken", "queue_full"), {"retry-after": "2"})
    person.say("hello")
    expect(page.locator(".fault")).to_contain_text("The server is busy")
    retry = page.locator(".fault button")
    expect(retry).to_be_disabled()
    expect(retry).to_have_text("Try again in 2 s")
    expect(retry).to_have_text("Try again")
    retry.click()
    person.settled()
    assert person.answers() == ["hello"]
    expect(page.locator(".fault")).to_be_hidden()


SAYINGS = {
    "stopping": (503, error("the server is stopping", "stopping"), "The server takes no requests now", "is stopping"),
    "deadline": (
        504,
        error("not finished within 9 s", "deadline"),
        "The answer took too long",
        "Not finished within 9 s.",
    ),
    "too long": (
        400,
        error("the prompt has 50 tokens, the context 20", "context_length_exceeded"),
        "This conversation is too long for the model",
        "The prompt has 50 tokens, the context 20.",
    ),
    "refused": (400, error("stop.0: too long"), "The server refused this request", "Stop.0: too long."),
    "another origin": (
        403,
        error("this origin may not call the server; --allow-origins adds one", "unknown_origin"),
        "The server does not know this page's address",
        "keep the Host header",
    ),
    "no JSON, 403": (403, "<h1>Forbidden</h1>", "The server refused this request", "Status 403."),
    "ours": (
        500,
        error("the server failed", "internal_error"),
        "The server failed at this answer",
        "The server failed.",
    ),
    "no JSON": (502, "<h1>Bad gateway</h1>", "The server failed at this answer", "Status 502."),
    "event": (
        200,
        pieces("begun ") + EVENT.format(error("the model's process has ended", "model_failed")),
        "The server failed at this answer",
        "process has ended",
    ),
    "draining": (
        200,
        pieces("begun ") + EVENT.format(error("the server is stopping", "stopping")),
        "The server takes no requests now",
        "",
    ),
    "cut": (200, pieces("begun ", "more"), "The connection broke off", "What had come until then is kept."),
    "no event": (200, pieces("begun ") + "data: {broken\n\n", "The server failed at this answer", "not JSON"),
    "<img>": (
        400,
        error("<img src=x onerror=alert(1)>"),
        "The server refused this request",
        "<img src=x onerror=alert(1)>",
    ),
}


@pytest.mark.parametrize("name", SAYINGS)
def test_what_the_server_says(person: Person, name: str) -> None:
    status, body, title, detail = SAYINGS[name]
    page = person.come()
    person.next_reply(status, body)
    person.say("hello")
    expect(page.locator(".fault strong")).to_have_text(title)
    expect(page.locator(".fault")).to_contain_text(detail)
    if status == 200:
        assert person.answers()[0].startswith("begun")
    assert page.locator(".fault img").count() == 0
    expect(page.locator("#door")).to_be_hidden()
    page.reload()
    expect(page.locator(".fault strong")).to_have_text(title)


def test_a_conversation_that_is_too_long_for_a_real_server(person: Person) -> None:
    page = person.come("brief")
    person.say(" ".join(map(str, range(50))))
    expect(page.locator(".fault strong")).to_have_text("This conversation is too long for the model")
    expect(page.locator(".fault")).to_contain_text("50 tokens")


def roles(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_a_message_without_an_answer_is_left_out_of_what_follows(person: Person) -> None:
    """Templates whose roles must alternate refuse two messages of the user's in a row."""
    page = person.come()
    person.say("first")
    for status in (500, 503):
        person.next_reply(status, error("no"))
        person.say(f"failed {status}")
        expect(page.locator(".unheard:visible")).to_have_count(0 if status == 500 else 1)
    [body] = person.requests_of(lambda: person.say("next"))
    assert roles(body) == [("user", "first"), ("assistant", "first"), ("user", "next")]
    expect(page.locator(".unheard:visible")).to_have_text(
        ["Without an answer, this message is not sent along with later ones."] * 2
    )
    page.reload()
    expect(page.locator(".unheard:visible")).to_have_count(2)
    again = page.locator(".turn").nth(1).get_by_role("button", name="Try again")
    [body] = person.requests_of(lambda: (again.click(), person.settled()))
    assert roles(body) == [("user", "first"), ("assistant", "first"), ("user", "failed 500")]
    expect(page.locator(".unheard:visible")).to_have_count(0)


def test_each_of_two_models_hears_what_it_answered(person: Person) -> None:
    page = person.come()
    page.get_by_role("button", name="Side by side").click()
    page.get_by_label("Second model").select_option("slow")
    page.route("**/v1/chat/completions", lambda route: refuse(route, "slow"))
    person.say("one")
    page.unroute("**/v1/chat/completions")
    bodies = person.requests_of(lambda: person.say("two"))
    heard = {body["model"]: roles(body) for body in bodies}
    assert heard == {"quick": [("user", "one"), ("assistant", "one"), ("user", "two")], "slow": [("user", "two")]}
    expect(page.locator(".answer").nth(1).locator(".unheard")).to_be_visible()
    expect(page.locator(".unheard:visible")).to_have_count(1)


def refuse(route: Route, model: str) -> None:
    if json.loads(route.request.post_data or "null")["model"] == model:
        route.fulfill(status=500, body=error("no"), content_type="application/json")
    else:
        route.continue_()


def test_models_are_looked_up_again_where_one_is_gone(person: Person) -> None:
    """As after a restart with another model."""
    page = person.come()
    names = json.dumps({"data": [{"id": "slow"}]})
    page.route("**/v1/models", lambda route: route.fulfill(status=200, body=names, content_type="application/json"))
    person.next_reply(404, error("there is no model 'quick'", "model_not_found"))
    person.say("hello")
    expect(page.locator(".fault")).to_contain_text("There is no model 'quick'.")
    expect(page.locator("#model")).to_have_value("slow")
    page.get_by_role("button", name="Try again").click()
    person.settled()
    assert person.answers() == ["hello"]


def test_a_server_that_is_gone_is_waited_for_once(person: Person) -> None:
    page = person.come()
    asked: list[Route] = []
    page.clock.install()
    page.route("**/v1/models", lambda route: (asked.append(route), route.abort()))
    page.route("**/v1/chat/completions", lambda route: route.abort(), times=1)
    person.say("hello")
    expect(page.locator("#status")).to_contain_text("The server cannot be reached")
    for _ in range(3):
        with page.expect_event("requestfailed"):
            page.clock.run_for(3000)
    assert len(asked) == 4
    page.unroute("**/v1/models")
    page.clock.run_for(3000)
    expect(page.locator("#status")).to_be_hidden()


def test_no_server_is_waited_for_for_days(person: Person) -> None:
    page = person.come()
    person.next_reply(503, error("full"), {"retry-after": "9999999"})
    person.say("hello")
    expect(page.locator(".fault button")).to_have_text("Try again in 3600 s")


def test_the_page_asks_for_a_key(person: Person) -> None:
    """As behind a proxy that lets everybody see the page."""
    page = person.page

    def look(route: Route) -> None:
        if route.request.headers.get("authorization") == f"Bearer {KEY}":
            route.continue_()
        else:
            route.fulfill(status=401, body=error("the key is missing or wrong"), content_type="application/json")

    page.route("**/v1/**", look)
    page.goto(person.address)
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#door-wrong")).to_have_text("The server did not take this key.")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#door")).to_be_hidden()
    expect(page.locator("#model")).to_be_enabled()
    person.say("hello")
    assert person.answers() == ["hello"]
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    assert page.evaluate("() => Object.values(localStorage).join().includes('forest')") is False
    page.locator("#forget-key").click()
    expect(field).to_be_focused()
    page.keyboard.press("Escape")
    person.say("no key")
    expect(page.locator(".fault strong")).to_have_text("This server asks for a key")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator(".prose").last).to_have_text("no key")


def test_a_server_with_a_key_opens_by_the_browsers_own_question(browser: Browser) -> None:
    with server(KEY) as (address, _):
        with visit(browser, address) as stranger:
            assert stranger.context.request.get(address).status == 401
        with visit(browser, address, http_credentials={"username": "me", "password": KEY}) as person:
            person.come()
            person.say("hello")
            assert person.answers() == ["hello"]

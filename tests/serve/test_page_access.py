"""The page for everybody: keyboard alone, phone, dark and light, less motion, screen readers (axe)."""

from collections.abc import Callable

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from tests.serve.browser import PHONE, WIDE, Person, error, visit

TALK = "# Title\n\n- a **b**\n- `c`\n\n> quote\n\n```python\nx = 1\n```\n\nend"


def nothing(person: Person) -> None:
    del person


def talk(person: Person) -> None:
    person.say(TALK)


def side_by_side(person: Person) -> None:
    person.page.get_by_role("button", name="Side by side").click()
    person.say(TALK)


def settings(person: Person) -> None:
    person.say(TALK)
    person.page.locator("#settings-open").click()
    person.page.get_by_label("Temperature", exact=True).fill("9")


def fault(person: Person) -> None:
    person.next_reply(429, error("busy"), {"retry-after": "60"})
    person.say("hello")


def editing(person: Person) -> None:
    person.say("hello")
    person.page.locator("#input").press("ArrowUp")


def conversations(person: Person) -> None:
    person.say("hello")
    if person.page.locator("#sidebar-open").is_visible():
        person.page.locator("#sidebar-open").click()
    person.page.get_by_role("button", name="Delete hello").focus()


def door(person: Person) -> None:
    person.next_reply(401, error("the key is missing or wrong"))
    person.say("hello")
    expect(person.page.locator("#door")).to_be_visible()


STATES: dict[str, Callable[[Person], None]] = {
    **{"empty": nothing, "talk": talk, "side by side": side_by_side, "settings": settings},
    **{"fault": fault, "editing": editing, "conversations": conversations, "door": door},
}


SEEN = {
    "light": (WIDE, "light", tuple(STATES)),
    "dark": (WIDE, "dark", ("talk", "side by side", "settings", "fault", "door")),
    "phone": (PHONE, "light", ("talk", "side by side", "settings", "conversations")),
    "dark phone": (PHONE, "dark", ("empty", "fault")),
}


@pytest.mark.parametrize("name", ["light", *(pytest.param(x, marks=pytest.mark.slow) for x in list(SEEN)[1:])])
def test_axe_finds_nothing(browser: Browser, address: str, name: str) -> None:
    size, scheme, states = SEEN[name]
    for state in states:
        with visit(browser, address, viewport=size, color_scheme=scheme, reduced_motion="reduce") as person:
            person.come()
            STATES[state](person)
            found = Axe().run(person.page, options={"resultTypes": ["violations"]})
            assert found.violations_count == 0, f"{state}: {found.generate_report()}"


def test_keyboard_alone(person: Person) -> None:
    page = person.come()
    page.locator("body").click(position={"x": 700, "y": 300})
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two/three")
    page.keyboard.press("Enter")
    person.settled()
    assert person.answers() == ["one\ntwo/three"]
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("End")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    person.asked(["one\ntwo/three!"])
    person.settled()


def test_every_control_is_reached_by_tab_and_shows_it(person: Person) -> None:
    page = person.come()
    person.say(TALK)
    page.locator("#input").fill("x")
    wanted = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, textarea, a")]
            .filter((one) => one.checkVisibility() && !one.disabled).length"""
    )
    page.evaluate("() => document.activeElement.blur()")
    seen = set()
    for _ in range(wanted + 10):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate("""() => {
                const now = document.activeElement;
                const all = [...document.querySelectorAll("button, select, input, textarea, a")];
                const style = getComputedStyle(now);
                const box = getComputedStyle(now.closest("#composer") ?? now);
                const shown = style.outlineStyle !== "none" || box.boxShadow !== "none";
                return [all.indexOf(now), shown];
            }""").__str__()
        )
    places = {text for text in seen if not text.startswith("[-1")}
    assert len(places) == wanted
    assert all(text.endswith("True]") for text in places)


def test_nothing_is_wider_than_a_phone(browser: Browser, address: str) -> None:
    with visit(browser, address, viewport=PHONE, has_touch=True, is_mobile=True) as person:
        page = person.come()

        def fits() -> None:
            assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE["width"]
            assert page.evaluate("() => document.querySelector('#scroller').scrollWidth") <= PHONE["width"]

        fits()
        page.locator("#versus").click()
        person.say("x" * 300 + "\n```\n" + "y" * 300 + "\n```\n")
        fits()
        page.locator("#settings-open").click()
        expect(page.get_by_label("System prompt")).to_be_in_viewport()
        fits()
        page.locator("#settings-close").click()
        page.locator("#sidebar-open").click()
        expect(page.locator("#sidebar-close")).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(page.locator("#sidebar-open")).to_be_focused()
        page.locator("#sidebar-open").click()
        page.locator("#new-chat").click()
        expect(page.locator("#sidebar")).to_be_hidden()
        person.asked([])


def paper(page: Page) -> str:
    return str(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))


def test_dark_and_light_by_system_and_by_choice(browser: Browser, address: str) -> None:
    light, dark = "rgb(253, 251, 247)", "rgb(26, 22, 19)"
    for scheme, system in (("light", light), ("dark", dark)):
        with visit(browser, address, color_scheme=scheme) as person:
            page = person.come()
            assert paper(page) == system
            page.locator("#theme").click()
            assert (paper(page), page.locator("#theme").inner_text()) == (light, "Theme: light")
            page.locator("#theme").click()
            assert paper(page) == dark
            page.reload()
            assert paper(page) == dark
            page.locator("#theme").click()
            assert paper(page) == system


def test_less_motion(browser: Browser, address: str) -> None:
    moving = "() => document.getAnimations().length"
    for motion, least in (("no-preference", 1), ("reduce", 0)):
        with visit(browser, address, reduced_motion=motion) as person:
            page = person.come("slow")
            person.say(" ".join(map(str, range(200))), wait=False)
            expect(page.locator(".prose")).to_contain_text("0 1 2")
            assert (page.evaluate(moving) >= 1) == (least == 1)
            page.keyboard.press("Escape")


def test_landmarks_and_what_is_read_out(person: Person) -> None:
    page = person.come()
    for role, name in (
        ("navigation", "Conversations"),
        ("main", None),
        ("region", "Conversation"),
        ("form", "Your message"),
    ):
        expect(page.get_by_role(role, name=name) if name else page.get_by_role(role)).to_have_count(1)
    expect(page.locator("#spoken")).to_have_attribute("aria-live", "polite")
    person.say("hello")
    expect(page.locator("#spoken")).to_have_text("quick says: hello")
    assert page.locator("html").get_attribute("lang") == "en"

"""How a model's text is drawn: structure from marks, never markup from text, work that grows with the length alone."""

import json
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from tests.serve.browser import DONE, PHONE, Person, pieces, visit


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    with visit(browser, address) as person:
        yield person.come()


# Draws a text in pieces of `size` characters; the tree as nested lists [tag, ...children], text as strings.
DRAW = """async ([text, size]) => {
    const { Writer } = await import("/page/markdown.js");
    const root = document.createElement("div");
    const writer = new Writer(root);
    for (let i = 0; i < text.length; i += size) writer.feed(text.slice(i, i + size));
    writer.end();
    const tree = (node) => {
        if (node.nodeType === 3) return node.data;
        if (node.className === "code") {
            return ["pre", node.querySelector("span").textContent, node.querySelector("code").innerText];
        }
        const more = (node.className ? "." + node.className : "") + (node.start > 1 ? ":" + node.start : "");
        return [node.localName + more, ...[...node.childNodes].map(tree)];
    };
    root.normalize();
    return [...root.childNodes].map(tree);
}"""

TEXTS: dict[str, tuple[str, list[object]]] = {
    "paragraphs": ("one\ntwo\n\nthree", [["p", "one\ntwo"], ["p", "three"]]),
    "windows": ("one\r\ntwo\r\n\r\nthree", [["p", "one\ntwo"], ["p", "three"]]),
    "spans": (
        "a **b *c*** `d*e` ~~f~~ __g__ _h_ snake_case_name 2*3*4 * x",
        [
            [
                *("p", "a ", ["strong", "b ", ["em", "c"]], " ", ["code", "d*e"], " ", ["del", "f"], " "),
                *(["strong", "g"], " ", ["em", "h"], " snake_case_name 2", ["em", "3"], "4 * x"),
            ],
        ],
    ),
    "open marks": ("**a `b *c", [["p", "**a `b *c"]]),
    "escapes": (r"\*a\* \` \x", [["p", r"*a* ` \x"]]),
    "code": ("x\n```py\na = 1\n\n  b\n```\ny", [["p", "x"], ["pre", "py", "a = 1\n\n  b"], ["p", "y"]]),
    "open code": ("```\n**a**\n<b>", [["pre", "text", "**a**\n<b>"]]),
    "fence in a longer fence": ("````\n```\n````\nz", [["pre", "text", "```"], ["p", "z"]]),
    "list": (
        "- a\n  - b\n  - c\n- d\n\nend",
        [["ul", ["li", ["p", "a"], ["ul", ["li", ["p", "b"]], ["li", ["p", "c"]]]], ["li", ["p", "d"]]], ["p", "end"]],
    ),
    "numbers": ("3. a\n4. b\n\n5. c", [["ol:3", ["li", ["p", "a"]], ["li", ["p", "b"]], ["li", ["p", "c"]]]]),
    "heading": ("# a *b*\ntext", [["p.heading", "a ", ["em", "b"]], ["p", "text"]]),
    "quote": ("> a\n> b\n\nc", [["blockquote", ["p", "a\nb"]], ["p", "c"]]),
    "rule": ("a\n\n---\nb", [["p", "a"], ["hr"], ["p", "b"]]),
    "markup": (
        "<b>x</b> <img src=x onerror=alert(1)> &amp; [a](javascript:alert(1))",
        [["p", "<b>x</b> <img src=x onerror=alert(1)> &amp; [a](javascript:alert(1))"]],
    ),
}


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("name", TEXTS)
def test_structure(page: Page, name: str, size: int) -> None:
    text, tree = TEXTS[name]
    assert page.evaluate(DRAW, [text, size]) == tree


HOSTILE = {
    "no line breaks": "x" * 100_000,
    "words": "word " * 20_000,
    "stars": "*" * 100_000,
    "open marks": "**a " * 25_000,
    "closed marks": "**a**_b_`c`" * 9_000,
    "backticks": "".join("`" * (i % 7 + 1) + "x" for i in range(20_000)),
    "code without end": "```\n" + "x" * 100_000,
    "code of many lines": "```\n" + "x = 1\n" * 16_000,
    "nesting": "\n".join(" " * (2 * i) + "- x" for i in range(300)),
    "quotes": ">" * 50_000 + " x",
    "right to left": "\u202e\u05d0\u05d1\u0627\u0628 " * 15_000,
    "combining": "a" + "\u0301" * 100_000,
    "astral": "\U0001f994" * 40_000,
    "zero width": "\u200b\u200d\u2060" * 30_000,
}

# Characters that are put into the tree while a text comes in pieces of 1,000, and the tree afterwards.
WORK = """async (text) => {
    const { Writer } = await import("/page/markdown.js");
    const root = document.createElement("div");
    let work = 0;
    const count = (records) => {
        for (const record of records) {
            for (const node of record.addedNodes) work += node.textContent.length + 1;
            if (record.type === "characterData") work += 10;
        }
    };
    const observer = new MutationObserver(count);
    observer.observe(root, { childList: true, characterData: true, subtree: true });
    const writer = new Writer(root);
    for (let i = 0; i < text.length; i += 1000) {
        writer.feed(text.slice(i, i + 1000));
        count(observer.takeRecords());
    }
    writer.end();
    const depth = (node) => 1 + Math.max(0, ...[...node.children].map(depth));
    const leaves = [...root.querySelectorAll("p, code > span")].map((node) => node.textContent.length);
    const nodes = root.querySelectorAll("*").length;
    return { work, depth: depth(root), nodes, longest: Math.max(...leaves), text: root.textContent };
}"""
PER_PIECE = 3 * (4000 + 2000 + 1000)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_costs_a_bounded_amount_for_each_piece(page: Page, name: str) -> None:
    text = HOSTILE[name]
    found = page.evaluate(WORK, text)
    assert found["work"] <= PER_PIECE * (len(text) / 1000 + 1)
    assert found["depth"] <= 20
    assert found["nodes"] <= len(text) + 10
    assert found["longest"] <= 4000 + 10
    if name in ("no line breaks", "stars", "right to left", "combining", "astral", "zero width"):
        assert found["text"] == text


def test_a_page_with_hostile_text_goes_on(browser: Browser, address: str) -> None:
    with visit(browser, address, viewport=PHONE) as person:
        page = person.come()
        for name in ("no line breaks", "closed marks", "code of many lines", "right to left", "combining"):
            text = HOSTILE[name]
            person.next_reply(200, pieces(*(text[i : i + 5000] for i in range(0, len(text), 5000))) + DONE)
            person.say("go")
            assert page.evaluate("() => document.documentElement.scrollWidth") == PHONE["width"]
        page.goto(address)  # a new one: the server reads no more than 800,000 characters
        person.say("still here")
        assert person.answers() == ["still here"]


def test_markup_from_a_model_is_text(browser: Browser, address: str) -> None:
    with visit(browser, address) as person:
        page = person.come()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        attack = '<img src=x onerror="alert(1)"><script>alert(2)</script><iframe src="/health"></iframe>'
        attack += '<svg onload=alert(3)><a href="javascript:alert(4)">x</a>'
        person.say(f"{attack}\n```<b>\n{attack}\n```\n- **{attack}**")
        expect(page.locator(".prose p").first).to_have_text(attack)
        expect(page.locator(".prose code")).to_have_text(attack)
        for tag in ("img", "script", "iframe", "a"):
            assert page.locator(f"#turns {tag}").count() == 0
        assert page.title() == f"{attack[:60]} \u2013 Kinkajou"
        drawings = ("/v1/chat/completions", "/page/mark.svg")
        assert [url for url in requests if not url.endswith(drawings)] == []
        page.reload()
        expect(page.locator(".prose code")).to_have_text(attack)


def test_a_character_that_is_cut_in_the_stream_is_whole(person: Person) -> None:
    page = person.come()
    found = page.evaluate(
        """async (bytes) => {
            const { events } = await import("/page/api.js");
            const stream = new ReadableStream({ start(control) {
                for (const byte of bytes) control.enqueue(new Uint8Array([byte]));
                control.close();
            } });
            const seen = [];
            for await (const data of events(stream)) seen.push(data);
            return seen;
        }""",
        list(
            ": note\r\ndata: {json}\r\n\r\ndata:a\ndata: b\n\nevent: x\ndata: half".replace(
                "{json}", json.dumps("\U0001f994é", ensure_ascii=False)
            ).encode()
        ),
    )
    assert found == ['"\U0001f994é"', "a\nb"]


@pytest.fixture
def person(browser: Browser, address: str) -> Iterator[Person]:
    with visit(browser, address) as found:
        yield found

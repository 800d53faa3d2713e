"""A browser, a server and a visitor for the tests of the page."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser
from tests.serve.browser import Person, chromium, server, visit


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Not for longer: as long as it is there, playwright's event loop runs, and no test can start one of its own.
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with server() as (found, _):
        yield found


@pytest.fixture
def person(browser: Browser, address: str) -> Iterator[Person]:
    with visit(browser, address) as found:
        yield found

"""Names of checkpoints, and their order."""

import pytest

from kinkajou.checkpoint.place import Place


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (Place(0), "step-000000"),
        (Place(120), "step-000120"),
        (Place(120, 3), "step-000120+003"),
        (Place(1234567, 1000), "step-1234567+1000"),
    ],
)
def test_name(place: Place, name: str) -> None:
    assert place.name == name
    assert Place.of(name) == place


@pytest.mark.parametrize(
    "name",
    [
        "step-120",
        "step-0000120",
        "step-000120+3",
        "step-000120+000",
        "step-000120+0003",
        "step-000120 ",
        "step-000120\n",
        ".step-000120.tmp",
        "step--00120",
        "step-٠٠٠١٢٠",
        "step-000120/..",
        "best",
        "",
    ],
)
def test_what_is_no_name(name: str) -> None:
    assert Place.of(name) is None


def test_order_is_by_steps_then_updates() -> None:
    names = ["step-000010", "step-000009+011", "step-000009+002", "step-000009", "step-1000000", "step-999999"]
    places = sorted(place for name in names if (place := Place.of(name)))
    assert [place.name for place in places] == [
        "step-000009",
        "step-000009+002",
        "step-000009+011",
        "step-000010",
        "step-999999",
        "step-1000000",
    ]

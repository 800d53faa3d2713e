from pathlib import Path

import pytest


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, so that places in messages are short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

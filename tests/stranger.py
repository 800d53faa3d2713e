"""A model's folder as somebody opens it who knows nothing of kinkajou: nothing is missing, too many or warned of."""

import logging
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging


class Ear(logging.Handler):
    """What transformers says at the level of a warning and above; its load reports come that way."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def opened(auto: Any, folder: Path, **options: Any) -> Any:
    """As a stranger opens it.  Python's own warnings are errors in these tests."""
    ear, logger, level = Ear(), logging.getLogger("transformers"), transformers_logging.get_verbosity()
    logger.addHandler(ear)
    transformers_logging.set_verbosity_warning()
    module, report = auto.from_pretrained(str(folder), output_loading_info=True, **options)
    transformers_logging.set_verbosity(level)
    logger.removeHandler(ear)
    assert ear.heard == []
    assert not any(report.values()), report
    return module.eval()

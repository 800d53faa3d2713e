"""What every TRL trainer of the comparison on a CPU is told alike."""

from typing import Any

QUIET: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
"""It trains, and writes and reports nothing."""

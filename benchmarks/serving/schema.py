"""schemathesis on the server's own OpenAPI schema, with a key set: every phase, every check, 10,000 cases at least."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.figures import Row, table

CASES, EACH = 10_000, 1000
KEY = "a-key-of-the-schema-campaign"
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "negative_data_rejection", "positive_data_acceptance"),
    *("missing_required_header", "unsupported_method", "allow_header_conformance", "ignored_auth"),
)


def command(port: int, each: int, seed: int, report: Path) -> list[str]:
    told = ["--checks", ",".join(CHECKS), "--max-examples", str(each), "--seed", str(seed), "--no-shrink"]
    told += ["--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure", "--request-timeout", "20"]
    told += ["--report", "ndjson", "--report-ndjson-path", str(report), "--no-color", "--suppress-health-check", "all"]
    program = str(Path(sys.executable).parent / "schemathesis")
    address = f"http://{servers.HOST}:{port}/openapi.json"
    return [program, "run", address, "--header", f"Authorization: Bearer {KEY}", *told]


def events(report: Path) -> Iterator[dict[str, Any]]:
    with report.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)

"""schemathesis on the server's own OpenAPI schema, with a key set: every phase, every check, 10,000 cases at least."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.figures import Row, table

CASES, EACH = 10_000, 1500
KEY = "a-key-of-the-schema-campaign"
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "negative_data_rejection", "positive_data_acceptance"),
    *("missing_required_header", "unsupported_method", "allow_header_conformance", "ignored_auth"),
)
SETTINGS = """\
[checks.negative_data_rejection]
expected-statuses = ["400", "401", "404", "405", "413", "415"]
"""
"""A wrong body that is too long is refused for its length; by default schemathesis does not take 413 for a refusal."""
TOLD = re.compile(r"^\s*([\d,]+) generated", re.MULTILINE)


def command(port: int, each: int, seed: int, report: Path) -> list[str]:
    told = ["--checks", ",".join(CHECKS), "--max-examples", str(each), "--seed", str(seed), "--no-shrink"]
    told += ["--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure", "--request-timeout", "20"]
    told += ["--report", "ndjson", "--report-ndjson-path", str(report), "--no-color", "--suppress-health-check", "all"]
    program = str(Path(sys.executable).parent / "schemathesis")
    address = f"http://{servers.HOST}:{port}/openapi.json"
    return [program, "run", address, "--header", f"Authorization: Bearer {KEY}", *told]


def scenarios(report: Path) -> Iterator[dict[str, Any]]:
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith('{"ScenarioFinished"'):
                yield json.loads(line)["ScenarioFinished"]


def counted(report: Path, known: Sequence[str]) -> Row:
    """Cases by phase, by operation (`known`: "GET /health") and by intent; checks; statuses of the answers."""
    phases, operations, modes = Counter[str](), Counter[str](), Counter[str]()
    checks, failed, statuses = Counter[str](), Counter[str](), Counter[str]()
    for found in scenarios(report):
        recorder = found["recorder"]
        for case in recorder.get("cases", {}).values():
            told = case["value"]
            phases[found["phase"]] += 1
            name = f"{told['method']} {told['path']}"
            operations[name if name in known else "other methods"] += 1
            modes[(told.get("meta") or {}).get("generation", {}).get("mode", "none")] += 1
        for results in recorder.get("checks", {}).values():
            for check in results:
                checks[check["name"]] += 1
                failed[check["name"]] += check["status"] != "success"
        for exchange in recorder.get("interactions", {}).values():
            answer = exchange.get("response")
            statuses[str(answer["status_code"]) if answer else "none"] += 1
    return {
        "cases": sum(phases.values()),
        "phases": dict(phases),
        "operations": dict(sorted(operations.items())),
        "modes": dict(modes),
        "checks": dict(checks),
        "failed": {name: count for name, count in failed.items() if count},
        "statuses": dict(sorted(statuses.items())),
    }


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    each = max(5, round(EACH * given.scale))
    with servers.stub(key=KEY) as server, tempfile.TemporaryDirectory(prefix="kinkajou-schema-") as folder:
        report = Path(folder) / "report.ndjson"
        (Path(folder) / "schemathesis.toml").write_text(SETTINGS)
        ended = subprocess.run(
            command(server.port, each, given.seed, report),
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.serving.schema_hooks", "PYTHONPATH": str(servers.ROOT)},
        )
        if not report.is_file():
            raise RuntimeError(
                f"schemathesis ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
            )
        routes = json.loads(server.call("GET", "/openapi.json")[1])["paths"]
        found = counted(report, [f"{method.upper()} {path}" for path, all_ in routes.items() for method in all_])
        tracebacks = server.log.read_text(errors="replace").count("Traceback")
        health = server.call("GET", "/health")[0]
    told = TOLD.search(ended.stdout)
    found |= {"told": int(told[1].replace(",", "")) if told else 0, "exit_code": ended.returncode}
    found |= {"tracebacks_logged": tracebacks, "health_afterwards": health}
    fine = ended.returncode == 0 and not found["failed"] and not tracebacks and health == 200
    fine &= not any(status.startswith("5") for status in found["statuses"])
    if not fine:
        print(ended.stdout[ended.stdout.find("= FAILURES") :][:12_000], ended.stderr[-2000:])
    return {"summary": found}, fine and (given.scale < 1 or found["cases"] >= CASES)


def page(figures: Row) -> str:
    found = figures["summary"]
    shown = {
        "cases": f"{found['cases']:,}",
        "by phase": ", ".join(f"{name} {count:,}" for name, count in found["phases"].items()),
        "by operation": ", ".join(f"{name} {count:,}" for name, count in found["operations"].items()),
        "meant to be right, wrong": ", ".join(f"{found['modes'].get(mode, 0):,}" for mode in ("positive", "negative")),
        "checks made": f"{sum(found['checks'].values()):,} ({len(found['checks'])} kinds)",
        "checks failed": sum(found["failed"].values()),
        "answers": ", ".join(f"{status}: {count:,}" for status, count in found["statuses"].items()),
        "tracebacks in the log": found["tracebacks_logged"],
    }
    return table(["schemathesis", ""], list(shown.items()))

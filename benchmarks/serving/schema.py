"""schemathesis on the server's own OpenAPI schema, with a key set: every phase, every check, 10,000 cases at least.

It keeps every body that it has sent, of up to 2 MiB, so it runs several times: all phases once, then with other seeds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving import servers
from benchmarks.serving.figures import Row, table

CASES, EACH, RUNS = 10_000, 300, 4
"""At least; examples for an operation in each run; runs."""
PHASES = ("examples", "coverage", "fuzzing", "stateful")
AGAIN = ("fuzzing", "stateful")
"""Phases that another seed changes."""
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


def command(port: int, each: int, seed: int, phases: Sequence[str], report: Path) -> list[str]:
    told = ["--checks", ",".join(CHECKS), "--max-examples", str(each), "--seed", str(seed), "--no-shrink"]
    told += ["--phases", ",".join(phases), "--continue-on-failure", "--request-timeout", "20"]
    told += ["--report", "ndjson", "--report-ndjson-path", str(report), "--no-color", "--suppress-health-check", "all"]
    program = str(Path(sys.executable).parent / "schemathesis")
    address = f"http://{servers.HOST}:{port}/openapi.json"
    return [program, "run", address, "--header", f"Authorization: Bearer {KEY}", *told]


def scenarios(report: Path) -> Iterator[dict[str, Any]]:
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith('{"ScenarioFinished"'):
                yield json.loads(line)["ScenarioFinished"]


class Counts:
    """Cases by phase, by operation (`known`: "GET /health") and by intent; checks; statuses of the answers."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known
        self.phases, self.operations, self.modes = Counter[str](), Counter[str](), Counter[str]()
        self.checks, self.failed, self.statuses = Counter[str](), Counter[str](), Counter[str]()

    def add(self, report: Path) -> None:
        for found in scenarios(report):
            recorder = found["recorder"]
            for case in recorder.get("cases", {}).values():
                told = case["value"]
                self.phases[found["phase"]] += 1
                name = f"{told['method']} {told['path']}"
                self.operations[name if name in self.known else "other methods"] += 1
                self.modes[(told.get("meta") or {}).get("generation", {}).get("mode", "none")] += 1
            for results in recorder.get("checks", {}).values():
                for check in results:
                    self.checks[check["name"]] += 1
                    self.failed[check["name"]] += check["status"] != "success"
            for exchange in recorder.get("interactions", {}).values():
                answer = exchange.get("response")
                self.statuses[str(answer["status_code"]) if answer else "none"] += 1

    def rows(self) -> Row:
        return {
            "cases": sum(self.phases.values()),
            "phases": dict(self.phases),
            "operations": dict(sorted(self.operations.items())),
            "modes": dict(self.modes),
            "checks": dict(self.checks),
            "failed": {name: count for name, count in self.failed.items() if count},
            "statuses": dict(sorted(self.statuses.items())),
        }


def one(port: int, each: int, seed: int, phases: Sequence[str], counts: Counts) -> int:
    """A run of schemathesis; returns its exit code."""
    with tempfile.TemporaryDirectory(prefix="kinkajou-schema-") as folder:
        report = Path(folder) / "report.ndjson"
        (Path(folder) / "schemathesis.toml").write_text(SETTINGS)
        ended = subprocess.run(
            command(port, each, seed, phases, report),
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.serving.schema_hooks", "PYTHONPATH": str(servers.ROOT)},
        )
        if not report.is_file():
            raise RuntimeError(
                f"schemathesis ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
            )
        counts.add(report)
    if ended.returncode:
        told = ended.stdout[max(0, ended.stdout.find("= FAILURES")) :][:12_000]
        print(f"schemathesis ended with {ended.returncode}:\n{told}{ended.stderr[-2000:]}")
    return ended.returncode


def run(given: argparse.Namespace) -> tuple[Row, bool]:
    each, runs = max(5, round(EACH * given.scale)), RUNS if given.scale >= 1 else 1
    with servers.stub(key=KEY) as server:
        routes = json.loads(server.call("GET", "/openapi.json")[1])["paths"]
        counts = Counts([f"{method.upper()} {path}" for path, all_ in routes.items() for method in all_])
        seeds = range(given.seed, given.seed + runs)
        codes = [one(server.port, each, x, AGAIN if x > given.seed else PHASES, counts) for x in seeds]
        tracebacks = server.log.read_text(errors="replace").count("Traceback")
        health = server.call("GET", "/health")[0]
    found = counts.rows() | {"exit_codes": codes, "tracebacks_logged": tracebacks, "health_afterwards": health}
    fine = not any(codes) and not found["failed"] and not tracebacks and health == 200
    fine &= not any(status.startswith("5") for status in found["statuses"])
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

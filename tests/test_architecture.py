"""The shape of the house: who may import whom, how long things may be, what never stands in the source."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "kinkajou"
MODULES = {path.relative_to(SRC).as_posix(): ast.parse(path.read_text()) for path in sorted(SRC.rglob("*.py"))}

# Place -> (packages of others, parts of kinkajou) besides the standard library and itself.  The longest prefix holds.
TORCH, HF = {"torch"}, {"transformers", "tokenizers"}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "__init__.py": (set(), set()),
    "__main__.py": (set(), {"cli", "output"}),
    "cli.py": ({"cyclopts"}, {"config", "errors", "commands", "flags", "train"}),
    "flags.py": ({"cyclopts"}, {"config"}),
    "commands.py": (
        {"cyclopts"},
        {"config", "flags", "train", "chat", "serve", "quant", "demo", "runs", "verify"},
    ),
    "errors.py": (set(), set()),
    "faults.py": (TORCH | {"numpy"}, {"errors"}),
    "exchange.py": (set(), {"data"}),
    "findings.py": (set(), set()),
    "config/": (set(), {"config", "errors"}),
    "checkpoint/": (set(), {"checkpoint", "data", "errors", "faults"}),
    "batch.py": (TORCH, set()),
    "memory.py": (TORCH, {"errors"}),
    "output.py": (set(), set()),
    "algos/": (TORCH, {"algos"}),
    "hub.py": (set(), {"errors"}),
    "untrusted.py": (set(), {"data", "errors"}),
    "models/": (TORCH | HF | {"peft", "safetensors"}, {"models", "batch", "algos", "errors", "hub", "untrusted"}),
    "models/load.py": (
        TORCH | HF | {"huggingface_hub"},
        {"models", "checkpoint", "errors", "hub", "untrusted"},
    ),
    "data/": (set(), {"data", "errors"}),
    "data/preflight.py": (set(), {"data", "errors", "findings"}),
    "data/chat.py": (HF | {"jinja2"}, {"data", "errors", "batch"}),
    "data/sources.py": (set(), {"data", "errors", "hub"}),
    "data/tokenizer.py": (HF, {"data", "errors", "hub", "untrusted"}),
    "data/template_child.py": ({"jinja2"}, set()),
    "parallel/": (TORCH | {"safetensors"}, {"parallel", "errors"}),
    "engine/": (TORCH | {"numpy"}, {"engine", "models", "batch", "algos", "errors"}),
    "engine/vllm_server.py": (set(), {"engine", "batch", "data", "errors", "exchange"}),
    "engine/vllm_start.py": (set(), {"engine", "errors", "exchange"}),
    "rewards/": (TORCH, {"rewards", "batch", "memory", "models", "data", "errors"}),
    "rewards/remote.py": (set(), {"rewards", "data", "errors", "exchange"}),
    "rewards/load.py": (TORCH | HF, {"rewards", "batch", "memory", "models", "data", "errors"}),
    "plan/": (set(), {"plan", "errors"}),
    "evals/": (TORCH, {"evals", "algos", "batch", "models", "findings"}),
    "evals/reward_page.py": ({"rich"}, {"evals", "findings"}),
    "report/": (set(), {"report", "errors"}),
    "train/": (
        TORCH | {"rich", "safetensors", "numpy"},
        {"train", "config", "errors", "findings", "faults", "batch", "memory", "checkpoint"}
        | {"algos", "models", "data", "parallel", "engine", "rewards", "evals", "plan"},
    ),
    "quant/": (
        TORCH | HF | {"peft", "safetensors", "bitsandbytes", "gguf", "numpy", "rich"},
        {
            "quant",
            "config",
            "errors",
            "batch",
            "algos",
            "checkpoint",
            "data",
            "engine",
            "hub",
            "models",
            "rewards",
            "evals",
        }
        | {"untrusted"},
    ),
    "chat/": ({"rich"}, {"chat", "config", "errors", "data"}),
    "chat/screen.py": ({"rich"}, {"errors", "output"}),
    "chat/talker.py": (TORCH, {"chat", "config", "errors", "batch", "data", "engine", "models"}),
    "serve/": (
        {"fastapi", "starlette", "uvicorn", "h11", "pydantic", "prometheus_client", "httpx"},
        {"serve", "config", "errors", "data", "exchange"},
    ),
    **{
        f"serve/worker{part}.py": (TORCH, {"serve", "errors", "faults", "batch", "data", "engine", "models"})
        for part in ("", "_engine", "_model", "_prompts", "_reward")
    },
    "runs.py": ({"rich"}, {"checkpoint", "data", "errors"}),
    "verify.py": ({"rich"}, {"checkpoint", "errors"}),
    "demo.py": (
        TORCH | {"rich"},
        {"config", "errors", "batch", "data", "engine", "models", "report", "rewards", "train"},
    ),
}
READS_CONFIG = (
    *("config/", "train/", "cli.py", "commands.py", "flags.py", "demo.py", "chat/"),
    *("quant/command.py", "quant/text.py", "quant/export.py", "serve/start.py"),
)
GROUP = ("Config", "Algorithm", "Numerics")
# Plumbing of the formulas: nothing that a paper could be cited for.
NO_SOURCE = {"alone", "masked_mean", "whiten", "explained_variance", "token_logps", "entropy"}
NO_SOURCE |= {"first_target", "last_target", "only_first", "bounded"}
# Foreign readers (the hub client, Arrow) and users' functions let any kind through; there each becomes a UserError.
CATCHES_ALL = {"data/sources.py", "data/containers.py", "data/tokenizer.py", "models/load.py", "rewards/worker.py"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names, `from a import b` as a.b: b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{item.name}" for item in node.names)


def rule_of(name: str) -> tuple[set[str], set[str]]:
    fitting = [place for place in RULES if name == place or (place.endswith("/") and name.startswith(place))]
    assert fitting, f"{name} has no rule: add its place to RULES (design.md, section 3)"
    return RULES[max(fitting, key=len)]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    others, own = rule_of(name)
    for dotted in imports(MODULES[name]):
        first, _, rest = dotted.partition(".")
        if first == "kinkajou":
            part = rest.partition(".")[0]
            is_module = (SRC / part).is_dir() or (SRC / f"{part}.py").is_file()
            assert not is_module or part in own, f"{name} imports kinkajou.{part}"
            assert part != "config" or name.startswith(READS_CONFIG), f"{name} reads settings"
        elif first not in sys.stdlib_module_names:
            assert first in others, f"{name} imports {first}"
        if dotted.startswith(("torch.distributed", "torch.nn.parallel")) or dotted.endswith("DistributedDataParallel"):
            assert name.startswith("parallel/"), f"{name} imports {dotted}"


def test_no_cycles() -> None:
    """Among imports that run when a module is imported: those outside functions."""
    edges: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
        edges[name] = {target for dotted in imports(top) for target in targets_of(dotted) if target != name}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for target in edges[name]:
                walk(target, (*path, name))
            done.add(name)

    for name in edges:
        walk(name, ())
    assert edges["train/ppo.py"] > {"train/update.py", "algos/losses.py"}  # the graph is not empty


def targets_of(dotted: str) -> list[str]:
    place = dotted.removeprefix("kinkajou").removeprefix(".").replace(".", "/")
    if not dotted.startswith("kinkajou"):
        return []
    found = [f"{place}.py", f"{place}/__init__.py", f"{place.rpartition('/')[0]}.py"]
    return [name for name in found if name in MODULES]


def python_files(*folders: str) -> list[Path]:
    """Ours: what is installed beside them lies in folders that begin with a dot."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def test_files_are_short() -> None:
    long = {str(path): n for path in python_files("src", "tests", "examples", "benchmarks") if (n := lines(path)) > 400}
    assert not long


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_functions_are_short() -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    for path in python_files("src", "examples", "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path}:{node.lineno} {node.name} has {length} lines"


def groups_of_settings() -> dict[str, ast.ClassDef]:
    return {
        node.name: node
        for name, tree in MODULES.items()
        for node in (tree.body if name.startswith("config/") else ())
        if isinstance(node, ast.ClassDef) and node.name.endswith(GROUP)
    }


def settings_of(node: ast.ClassDef) -> list[tuple[ast.AnnAssign, ast.stmt | None]]:
    """Fields of a group, each with the statement after it."""
    following = [*node.body[1:], None]
    pairs = zip(node.body, following, strict=True)
    return [(item, after) for item, after in pairs if isinstance(item, ast.AnnAssign)]


def test_every_setting_is_explained_and_groups_are_small() -> None:
    classes = groups_of_settings()
    assert len(classes) >= 20

    def size(node: ast.ClassDef) -> int:
        return len(settings_of(node)) + sum(size(classes[ast.unparse(base)]) for base in node.bases)

    for node in classes.values():
        assert size(node) <= 15, f"{node.name} has {size(node)} fields"
        for item, after in settings_of(node):
            if isinstance(item.annotation, ast.Name) and item.annotation.id.endswith(GROUP):
                assert item.annotation.id in classes
                continue  # a group: its own fields are explained
            words = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            assert isinstance(words, str), f"{node.name}.{ast.unparse(item.target)}"
            assert len(words) > 10


def test_every_formula_cites_its_source() -> None:
    """By author and year: a capitalised name, then 18xx, 19xx or 20xx."""
    bare = set()
    for name, tree in MODULES.items():
        for node in tree.body if name.startswith("algos/") else ():
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                words = ast.get_docstring(node) or ""
                assert words, f"{name}: {node.name} has no docstring"
                if not re.search(r"[A-Z]\w+,? (18|19|20)\d\d\b", words):
                    bare.add(node.name)
    assert bare == NO_SOURCE


@pytest.mark.parametrize("name", MODULES)
def test_what_never_stands_in_the_source(name: str) -> None:
    for dotted in imports(MODULES[name]):
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml", "joblib"}
        assert dotted.partition(".")[0] not in banned, f"{name} imports {dotted}"
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {kind and ast.unparse(kind) for kind in kinds}
            assert not caught & {None, "BaseException"}, f"{name}:{node.lineno} catches everything"
            if "Exception" in caught:
                assert name in CATCHES_ALL, f"{name}:{node.lineno} catches everything"
                assert ast.unparse(node.body[-1]).startswith("raise UserError("), f"{name}:{node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "__import__"), f"{name}:{node.lineno} {called}"
            given = {word.arg: word.value for word in node.keywords}
            assert called != "torch.load" or ast.unparse(given["weights_only"]) == "True", f"{name}:{node.lineno}"
            trust = given.get("trust_remote_code")
            assert trust is None or ast.unparse(trust) == "False", f"{name}:{node.lineno}"


def test_the_command_line_comes_up_without_torch() -> None:
    code = "import sys, kinkajou.cli; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["sft", "--help"], ["ppo", "--help"], ["--version"]])
def test_help(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "kinkajou", *arguments], capture_output=True, text=True, check=True)
    words = {"--help": "ppo", "sft": "--batch-size", "ppo": "--kl-coef", "--version": "0."}[arguments[0]]
    assert words in done.stdout
    assert done.stderr == ""

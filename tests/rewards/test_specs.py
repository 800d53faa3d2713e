"""How a recipe names its judges, and what is refused before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from kinkajou.errors import UserError
from kinkajou.rewards.specs import Spec, check_specs, parse_spec, parse_specs, reward_model_folder


@pytest.mark.parametrize(
    ("text", "spec", "name"),
    [
        ("rule:ended", Spec(1, "rule", "rule:ended"), "rule:ended"),
        (" 0.5 * rule:length:3 ", Spec(0.5, "rule", "rule:length:3"), "rule:length"),
        ("-1e-1*runs/reward", Spec(-0.1, "model", "runs/reward"), "model:reward"),
        ("rule:regex:a*b", Spec(1, "rule", "rule:regex:a*b"), "rule:regex"),
        ("2*rule:regex:a*b", Spec(2, "rule", "rule:regex:a*b"), "rule:regex"),
        ("ensemble:a, b/c", Spec(1, "ensemble", "a,b/c"), "ensemble"),
        ("http://h:80/x", Spec(1, "service", "http://h:80/x"), "http:h:80"),
        ("0.5*https://h/x*y?z=1", Spec(0.5, "service", "https://h/x*y?z=1"), "http:h"),
        ("http://[::1]:8000/", Spec(1, "service", "http://[::1]:8000/"), "http:[::1]:8000"),
        ("python:os.path:join", Spec(1, "function", "os.path:join"), "python:join"),
        ("json:dumps", Spec(1, "function", "json:dumps"), "python:dumps"),
        ("owner/name", Spec(1, "model", "owner/name"), "model:name"),
        ("runs/a*b", Spec(1, "model", "runs/a*b"), "model:a*b"),
    ],
)
def test_a_spec_is_read(text: str, spec: Spec, name: str) -> None:
    assert parse_spec(text) == spec
    assert parse_spec(text).name == name


def test_a_folder_may_have_a_colon(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert parse_spec(str(tmp_path / "a:b")).kind == "model"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a reward is empty"),
        ("2*", "a reward is empty"),
        ("x*rule:ended", "weight must be a number"),
        ("nan*rule:ended", "weight must be a number"),
        ("inf*m", "weight must be a number"),
        ("*m", "weight must be a number"),
        ("rule:nope", "unknown rule 'nope'"),
        ("rules:ended", "did you mean rule:ended?"),
        ("ensmble:a,b", "did you mean ensemble:a,b?"),
        ("ensemble:a", "two different"),
        ("ensemble:a,a", "two different"),
        ("ensemble:", "two different"),
        ("http:", "sound URL"),
        ("http://", "sound URL"),
        ("http://a b/", "sound URL"),
        ("http://h:port/", "sound URL"),
        ("http://h:99999/", "sound URL"),
        ("http://h/#x", "sound URL"),
        ("http://h/é", "sound URL"),
        ("http://[::1", "sound URL"),
        (f"http://{'x' * 70}/", "sound URL"),
        ("http://me:secret@h/", "no password"),
        ("python:json", "module:function"),
        ("python:json:", "module:function"),
        ("python:a/b:c", "module:function"),
        ("json:dumps:more", "module:function"),
        ("runs/old:run", "module:function"),
        ("nosuchmodule_x:f", "no Python module 'nosuchmodule_x'"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_specs(["rule:ended", text])
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_module_beside_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        check_specs(["my_rewards_x:f"])
    (tmp_path / "my_rewards_x.py").write_text("raise SystemExit('not to be run here')")
    before = list(sys.path)
    check_specs(["my_rewards_x:f"])
    assert sys.path == before


def test_a_reward_given_twice_is_refused() -> None:
    assert [term.weight for term in parse_specs(["rule:length:3", "-1*rule:length:4"])] == [1, -1]
    with pytest.raises(UserError, match="given twice"):
        parse_specs(["rule:ended", "0.5*rule:ended"])


@pytest.mark.parametrize(
    ("specs", "folder"),
    [
        ([], None),
        (["rule:ended", "json:dumps", "http://h/"], None),
        (["rule:ended", "0.5*a", "b"], "a"),
        (["ensemble:a,b", "c"], "a"),
        (["-1*a", "b"], "b"),
    ],
)
def test_the_critic_may_start_from(specs: list[str], folder: str | None) -> None:
    assert reward_model_folder(specs) == folder


def test_checking_does_not_import_torch() -> None:
    code = "import sys; from kinkajou.rewards.specs import check_specs; check_specs(['rule:ended', 'a']); "
    code += "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"

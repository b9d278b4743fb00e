"""What the README shows works: its Python runs, its commands and files exist."""

import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python_of_the_readme_runs_and_its_shape_comments_hold():
    names: dict = {}
    for code in blocks("python"):
        exec(code, names)
    assert names["x"].shape == (2, 8, 196, 12, 64)
    assert names["cls"].shape == (2, 12, 64)
    assert names["directions"].shape == (1, 7, 16)


def test_ci_sets_up_and_tests_by_the_commands_of_the_readme():
    script = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    first, second = (block.strip() for block in blocks("sh")[:2])
    assert first.endswith("python -m timefast.train --backbone timesformer")
    assert second.endswith("python -m pytest -n auto")
    assert script.index(first) < script.index(second)


def test_commands_of_the_readme_exist():
    modules = set(re.findall(r"python -m (timefast\.\w+)", "\n".join(blocks("sh"))))
    assert "timefast.train" in modules
    missing = [m for m in sorted(modules) if find_spec(m) is None]
    assert not missing


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    missing = [
        link for link in links if not link.startswith("https://") and not (ROOT / link).exists()
    ]
    assert not missing

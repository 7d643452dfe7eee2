"""Every YAML file that is shipped is written alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from yamllint import linter
from yamllint.config import YamlLintConfig

from tests.deploy.programs import DEPLOY

RULES = YamlLintConfig(
    """
extends: default
rules:
  line-length: {max: 110}
  document-start: disable
  comments: {min-spaces-from-content: 1}
  truthy: {check-keys: false}
"""
)

FILES = sorted([*DEPLOY.rglob("*.yml"), *DEPLOY.rglob("*.yaml")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_a_file_is_tidy(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [str(problem) for problem in linter.run(text, RULES, str(path))] == []

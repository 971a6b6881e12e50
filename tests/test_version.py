"""The version stands in jax_fa3/__init__.py alone; the changelog starts with its section."""

import re
from pathlib import Path

import jax_fa3

ROOT = Path(__file__).parents[1]


def test_the_changelog_starts_with_this_version():
    section = re.search(r"^## (\S+)( - unreleased)?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    release, is_development = re.fullmatch(
        r"(\d+\.\d+\.\d+)(\.dev\d+)?", jax_fa3.__version__
    ).groups()
    assert section[1] == release
    assert bool(section[2]) == bool(is_development)


def test_no_other_file_has_a_version_of_its_own():
    for name in ("pyproject.toml", "CITATION.cff", "CMakeLists.txt"):
        assert not re.search(r"(?m)^\s*version\s*[:=]\s*\"?\d", (ROOT / name).read_text()), name

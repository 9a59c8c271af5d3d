"""The name that the package has on an index, its version, and what messages and pages say about installing."""

from __future__ import annotations

import re
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest

import agentstate

ROOT = Path(__file__).parent.parent
TEXTS = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.py"), *ROOT.glob("agentstate/**/*.py"),
    ROOT / "setup.cfg", ROOT / "tox.ini",
]  # fmt: skip


@pytest.fixture
def setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_the_version_is_that_of_the_installed_distribution(setup: ConfigParser) -> None:
    assert version(setup["metadata"]["name"]) == agentstate.__version__


def test_extras_that_are_named_exist_in_our_distribution(setup: ConfigParser) -> None:
    name, extras = setup["metadata"]["name"], set(setup["options.extras_require"])
    for path in TEXTS:
        for whose, named in re.findall(
            r"(\bagentstate[\w-]*|pip install '?\.)\[([a-z0-9, ]+)\]", path.read_text("utf-8")
        ):
            assert whose == name or whose.endswith("."), f"{path}: {whose}[{named}] is another package on the index"
            assert set(named.replace(" ", "").split(",")) <= extras, f"{path}: no such extra in [{named}]"


def test_nobody_is_told_to_install_the_other_package_of_this_name() -> None:
    for path in TEXTS:
        assert not re.search(r"pip install [^\n`]*\bagentstate(?!-store)\b(?!/)", path.read_text("utf-8")), path

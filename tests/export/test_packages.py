"""What errors and `bdtool doctor` say is to be installed."""

import re
import tomllib
from pathlib import Path

from export import packages

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_a_command_installs_what_the_extra_holds() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in packages._EXTRAS:
        assert re.findall(r'"([^"]+)"', packages.install_command(extra)) == extras[extra]
    assert set(extras) - set(packages._EXTRAS) == {"demo", "dev"}  # for a clone, whose Makefile installs them


def test_no_message_sends_to_the_stranger_s_package_of_our_name() -> None:
    sources = [path for room in ("bdtool", "engines", "export", "calibration") for path in Path(room).rglob("*.py")]
    assert len(sources) > 100
    for path in sources:
        assert not re.search(r"pip install .?bdtool", path.read_text(encoding="utf-8")), path

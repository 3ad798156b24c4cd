"""deploy/: the unit passes systemd's own judges, the pins are what runs here, the image copies what is."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)


@pytest.fixture(params=UNITS, ids=lambda unit: unit.name)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit whose program exists on this machine, as verify demands; otherwise as it ships."""
    shipped: Path = request.param
    text = shipped.read_text(encoding="utf-8")
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert program is not None
    copy = tmp_path / shipped.name
    copy.write_text(text.replace(f"ExecStart={program[1]}", "ExecStart=/bin/true"), encoding="utf-8")
    return copy


@needs_systemd
def test_a_unit_passes_verify_without_a_word(unit: Path) -> None:
    """An unknown key exits 0, so only silence is success."""
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_the_lines_that_open_a_unit_for_its_sources_are_taken_as_they_stand(tmp_path: Path) -> None:
    """They had comments behind values, which systemd takes for values."""
    guide = (DEPLOY / "INSTALL.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^```ini\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)
    opened = tmp_path / "opened.service"
    opened.write_text(f"{lines}ExecStart=/bin/true\n", encoding="utf-8")
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(opened)], capture_output=True, text=True, timeout=60
    )
    assert (verified.returncode, verified.stdout + verified.stderr) == (0, "")


@needs_systemd
def test_a_unit_is_exposed_by_at_most_two_of_ten(unit: Path) -> None:
    """As systemd scores it; the threshold is in tenths."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", str(unit)]
    scored = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert scored.returncode == 0, scored.stdout


def test_a_unit_gives_a_stop_its_twenty_seconds() -> None:
    """SIGTERM ends Edgewater within 20 s; systemd must not kill it sooner."""
    assert UNITS
    for path in UNITS:
        text = path.read_text(encoding="utf-8")
        assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.MULTILINE)[1]) >= 25  # type: ignore[index]
        learns = "edgewater ingest" not in text
        assert ("MemoryDenyWriteExecute=yes" in text) != learns, "torch's bf16 products need it off"


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _pins() -> dict[str, list[str]]:
    """Read constraints.txt: versions by name, several where a marker chooses."""
    pins: dict[str, list[str]] = {}
    for line in (DEPLOY / "constraints.txt").read_text(encoding="utf-8").splitlines():
        pinned = re.match(r"([a-z0-9-]+)==([^;\s]+)(; .*)?$", line)
        if pinned:
            pins.setdefault(pinned[1], []).append(pinned[2])
        else:
            assert not line or line.startswith("#"), line
    return pins


def test_every_dependency_is_pinned_with_all_that_it_brings() -> None:
    """Followed through the installed packages' own requirements, without extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    waiting = [
        _name(entry) for entry in [*project["dependencies"], *(entry for extra in extras for entry in extra)]
    ]
    pins, seen = _pins(), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        assert name in pins, f"{name} is not in deploy/constraints.txt"
        for requirement in importlib.metadata.requires(name) or []:
            if ";" not in requirement:
                waiting.append(_name(requirement))


def test_the_pins_are_what_these_tests_run_with() -> None:
    """So "tested" in constraints.txt is true."""
    for name, versions in _pins().items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert installed.partition("+")[0] in versions, name


def test_the_image_copies_what_exists_and_what_the_context_holds() -> None:
    """A file that .dockerignore drops, or that was renamed, fails only when somebody builds."""
    allowed = [
        line[1:]
        for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line[:1] == "!"
    ]
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    copies = [line.split()[1:-1] for line in text.splitlines() if line.startswith("COPY ")]
    assert copies
    for source in (source for sources in copies for source in sources):
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


def test_the_image_does_not_run_as_root() -> None:
    """The last USER is a number, so that the platform can tell it is not root."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    users = re.findall(r"^USER (\S+)$", text, re.MULTILINE)
    assert users
    assert int(users[-1].partition(":")[0]) > 0
    assert re.search(r"^HEALTHCHECK ", text, re.MULTILINE)

"""Installing: a CPU build of torch or none, twice is once, and a wheel that holds what runs.

Nothing is downloaded: a folder of tiny wheels made here stands for the package index.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# A build backend inside the project, so that its installation needs nothing from outside either.
BACKEND = """
import sys
sys.path.insert(0, ".")
from wheels import write_wheel

def build_wheel(folder, config_settings=None, metadata_directory=None):
    return write_wheel(folder, "edgewater", "0.1", ["torch; extra == 'train'"], extra="train")

build_editable = build_wheel
"""


def write_wheel(folder: str, name: str, version: str, requires: list[str], extra: str = "") -> str:
    """Write a wheel that holds nothing but its metadata."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Provides-Extra: {extra}"] if extra else []
    lines += [f"Requires-Dist: {requirement}" for requirement in requires]
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{info}/METADATA": "\n".join(lines) + "\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of the same shape as ours that installs in seconds."""
    import inspect

    root = tmp_path / "project"
    (root / "deploy").mkdir(parents=True)
    (tmp_path / "wheels").mkdir()
    shutil.copy(REPOSITORY / "deploy" / "install.sh", root / "deploy")
    shutil.copy(REPOSITORY / "Makefile", root)
    (root / "deploy" / "constraints.txt").write_text("torch==2.13.0\nsetuptools==99\n")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "edgewater"\nversion = "0.1"\n[project.optional-dependencies]\ntrain = ["torch"]\n'
    )
    imports = "import base64, hashlib, zipfile\nfrom pathlib import Path\n"
    (root / "wheels.py").write_text(imports + inspect.getsource(write_wheel))
    (root / "backend.py").write_text(BACKEND)
    write_wheel(str(tmp_path / "wheels"), "setuptools", "99", [])
    return root


def _install(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with the folder of wheels as its only index."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    offline = {
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "TORCH_INDEX": "none",
        "WHEELS": str(project.parent / "wheels"),
        "PYTHON": sys.executable,
    }
    return subprocess.run(
        ["bash", str(project / "deploy" / "install.sh"), *arguments],
        env={**clean, **offline, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def _installed(project: Path) -> set[str]:
    packages = (project / ".venv" / "lib").glob("python3.*/site-packages/*.dist-info")
    return {path.name.partition("-")[0] for path in packages} - {"pip"}


def test_a_torch_that_brings_cuda_is_refused_with_ways_out(project: Path) -> None:
    """Gigabytes never come by accident, and no half-made environment stays behind."""
    write_wheel(str(project.parent / "wheels"), "torch", "2.13.0", ["nvidia-cublas"])
    write_wheel(str(project.parent / "wheels"), "nvidia-cublas", "13", [])
    refused = _install(project)
    assert refused.returncode == 1
    for way in ("TORCH_INDEX=", "WHEELS=", "PYTHON=", "CUDA=1"):
        assert way in refused.stderr
    assert not (project / ".venv").exists()


def test_no_torch_at_all_is_not_taken_for_cuda(project: Path) -> None:
    """A network that is down asks for other help than a torch that is too large."""
    refused = _install(project)
    assert refused.returncode == 1
    assert "pip finds no torch" in refused.stderr
    assert "CUDA=1" not in refused.stderr
    assert not (project / ".venv").exists()


def test_cuda_comes_when_it_is_asked_for(project: Path) -> None:
    """CUDA=1 is the accident's opposite."""
    write_wheel(str(project.parent / "wheels"), "torch", "2.13.0", ["nvidia-cublas"])
    write_wheel(str(project.parent / "wheels"), "nvidia-cublas", "13", [])
    done = _install(project, CUDA="1")
    assert done.returncode == 0, done.stderr
    assert _installed(project) == {"edgewater", "torch", "nvidia_cublas", "setuptools"}


def test_a_cpu_build_installs_and_a_second_run_keeps_it(project: Path) -> None:
    """The environment that is there is taken as it is."""
    write_wheel(str(project.parent / "wheels"), "torch", "2.13.0+cpu", [])
    done = _install(project)
    assert done.returncode == 0, done.stderr
    assert _installed(project) == {"edgewater", "torch", "setuptools"}
    marker = project / ".venv" / "marker"
    marker.touch()
    again = _install(project, PYTHON="")
    assert again.returncode == 0, again.stderr
    assert marker.exists()


def test_without_torch_nothing_is_asked_about_it(project: Path) -> None:
    """A box that only ingests takes the core alone."""
    done = _install(project, "--extras", "")
    assert done.returncode == 0, done.stderr
    assert _installed(project) == {"edgewater", "setuptools"}


def test_an_unfit_python_is_named_with_what_to_do(project: Path) -> None:
    """Also one that exists and is too old, or a shim that answers nothing."""
    shim = project / "python-shim"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    refused = _install(project, PYTHON=str(shim))
    assert refused.returncode == 1
    assert "apt-get install python3 python3-venv" in refused.stderr


def test_a_folder_that_is_no_environment_is_never_cleared(project: Path) -> None:
    """A slip in the folder's name must not delete somebody's work."""
    precious = project / "work"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    refused = _install(project, str(precious))
    assert refused.returncode == 1
    assert "no virtual environment" in refused.stderr
    assert (precious / "thesis.txt").read_text() == "years"


def test_make_installs_once_until_what_decides_it_changes(project: Path) -> None:
    """`make demo` and `make test` install on the first call and nothing on the second."""
    (project / "deploy" / "install.sh").write_text(
        "#!/bin/sh\necho installed >> log\nmkdir -p .venv/bin\n"
        "for name in edgewater python; do\n"
        "  printf '#!/bin/sh\\necho ran %s \"$@\" >> log\\n' $name > .venv/bin/$name\ndone\n"
        "chmod +x .venv/bin/*\n"
    )

    def make(*targets: str) -> list[str]:
        subprocess.run(
            ["make", *targets], cwd=project, check=True, capture_output=True, env={"PATH": os.environ["PATH"]}
        )
        return (project / "log").read_text().splitlines()

    assert make("install") == ["installed"]
    assert make("demo", "ARGS=--all") == ["installed", "ran edgewater demo --all"]
    assert make("test")[2:] == ["ran python -m pytest"]
    later = (project / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(project / "deploy" / "constraints.txt", (later, later))
    assert make("install").count("installed") == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for package in ("storage", "adapters", "pipeline"):
        shutil.copytree(REPOSITORY / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], check=True, capture_output=True, timeout=120
    )
    return next(folder.glob("edgewater-*.whl"))


def test_the_wheel_holds_every_file_of_the_three_packages(wheel: Path) -> None:
    """Data files are easily forgotten: what git has under the packages is what is installed."""
    listed = subprocess.run(
        ["git", "ls-files", "storage", "adapters", "pipeline"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(archive.read(name).decode() for name in names if name.endswith("/METADATA"))
        entry_points = next(
            archive.read(name).decode() for name in names if name.endswith("/entry_points.txt")
        )
    assert [path for path in listed if path not in names] == []
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "storage",
        "adapters",
        "pipeline",
    }
    assert "edgewater = pipeline.cli:main" in entry_points
    assert "Classifier: Private :: Do Not Upload" in metadata
    assert re.search(r"^Requires-Python: <3\.13,>=3\.11", metadata, re.MULTILINE)


def test_the_installed_package_runs_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """The command line, the schema made from docstrings and the demo's data come from the wheel alone."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import pipeline.config as c, pipeline.demo_data as d, pipeline.cli\n"
        "assert pipeline.cli.__file__.startswith(sys.argv[1]), pipeline.cli.__file__\n"
        "assert d.WORK_ORDERS.stat().st_size > 10_000 and d.WEATHER.is_file()\n"
        "assert c.schema()['properties']['data_dir']['description']\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, str(site)], cwd=tmp_path, check=True, timeout=60)


def test_each_dependency_has_its_reason() -> None:
    """One sentence beside each, as a comment on its line."""
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(entry for extra in extras for entry in extra)]:
        line = next(line for line in text.splitlines() if f'"{requirement}"' in line)
        assert len(line.partition("#")[2].split()) >= 4, line

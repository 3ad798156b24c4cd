"""What ingest opens and creates, as strace sees it: names that others chose lead nowhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.crash.lives import cannot_trace
from tests.e2e.stream import arguments, edgewater, environment

pytestmark = pytest.mark.slow

HOSTILE_NAMES = ("../../x", "..", "/etc/passwd", "a/b", "a\0b", "..\n", "x" * 5_000, "%2e%2e%2fx", "\u202ex")
CREATING = {
    "mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "link", "linkat",
    "symlink", "symlinkat", "mknod", "mknodat", "creat", "truncate", "chmod", "fchmodat", "chown", "fchownat",
}  # fmt: skip
_CALL = re.compile(r"^\d+ +(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?(?: .*)?$")
_PATH = re.compile(r'(?:(?:AT_FDCWD|\d+)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"')


class Call(NamedTuple):
    """A call that succeeded: its name, its arguments, the paths in them, and the path of what it opened."""

    name: str
    arguments: str
    paths: list[str]
    opened: str


def calls_of(trace: Path) -> Iterator[Call]:
    """Every call with a path that succeeded; a call in two lines is joined."""
    begun: dict[str, str] = {}
    for raw in trace.read_text("ascii").splitlines():
        line, pid = raw, raw.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>")
            continue
        if "<... " in line:
            line = begun.pop(pid) + line.partition(" resumed>")[2]
        match = _CALL.match(line)
        if match is None or int(match[3]) < 0:
            assert match or "+++" in line or "---" in line or " = ?" in line, line
            continue
        paths = [os.path.normpath(Path(_text(at), _text(name))) for at, name in _PATH.findall(match[2])]
        yield Call(match[1], match[2], paths, _text(match[4] or ""))


def _text(printed: str) -> str:
    """What strace printed, with its escapes taken back."""
    return os.fsdecode(printed.encode("ascii").decode("unicode_escape").encode("latin-1"))


def writes(call: Call) -> bool:
    """Whether it may change something under a name."""
    return call.name in CREATING or (
        call.name in ("open", "openat", "openat2")
        and re.search(r"O_(WRONLY|RDWR|CREAT|TRUNC|TMPFILE)", call.arguments) is not None
    )


def test_hostile_names_lead_nowhere(tmp_path: Path, tiny_model: Path) -> None:
    if reason := cannot_trace():
        pytest.skip(reason)
    inbox, outside, data = tmp_path / "inbox", tmp_path / "outside", tmp_path / "data"
    inbox.mkdir()
    outside.mkdir()
    secret = b'{"kind":"text","text":"secret %d"}\n'
    (outside / "secret.jsonl").write_bytes(secret % 1)
    (inbox / "a-link.jsonl").symlink_to("/etc/passwd")
    (inbox / "b-link.jsonl").symlink_to(outside / "secret.jsonl")
    (inbox / "c-folder").symlink_to(outside)
    (inbox / "d-loop").symlink_to(".")
    os.mkfifo(inbox / "e-pipe.jsonl")
    (inbox / "f-folder.jsonl").mkdir()
    for number, name in enumerate(
        ("x..\n", "..\n", "...jsonl", "\\..\\x.jsonl", "%2e%2e.jsonl", "\udcff\n.jsonl")
    ):
        (inbox / name).write_text(f'{{"kind":"text","text":"file {number}"}}\n')
    events = [
        {"kind": "text", "text": f"{field} {number}", "ts": 1e9, field: name}
        for field in ("source", "subject", "id")
        for number, name in enumerate(HOSTILE_NAMES)
    ]
    events += [{"kind": "feedback", "about": name, "rating": 1} for name in HOSTILE_NAMES]
    (inbox / "z.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = tmp_path / "edgewater.toml"
    config.write_text(
        f'data_dir = "{data}"\n[ring]\nflush_ms = 100\n[health]\nlisten = ""\n'
        f'[[sources]]\nname = "flat"\nkind = "files"\npath = "{inbox}"\n'
        f'[[sources]]\nname = "deep"\nkind = "files"\npath = "{inbox}/**/*.jsonl"\n'
    )
    words = ["--config", str(config), *arguments(tiny_model)]
    trace = tmp_path / "trace"
    # Two names are hidden; one of the others has an ending that only `flat` takes.
    count = 2 * (len(events) + 3) + 1
    tracer = ["strace", "-f", "-qq", "-y", "-s", "8192", "-e", "trace=%file", "-e", "signal=none", "-o"]
    ingest = [sys.executable, "-m", "pipeline", "ingest", "--max-events", str(count), *words]
    done = subprocess.run(
        [*tracer, str(trace), *ingest],
        env={**environment(), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    calls = [*calls_of(trace)]
    opened = {call.opened for call in calls}
    assert f"{inbox}/z.jsonl" in opened, "the trace is of what it should be"
    assert f"{inbox}/x..\n" in opened, "an odd name is a name"
    assert not {path for path in opened if Path(path).is_relative_to(outside)}
    assert "/etc/passwd" not in opened
    assert f"{inbox}/e-pipe.jsonl" not in opened
    changed = {path for call in calls if writes(call) for path in [call.opened or call.paths[-1]]}
    assert f"{data}" in {str(Path(path).parent) for path in changed}
    elsewhere = {path for path in changed if not Path(path).is_relative_to(data)}
    assert {path for path in elsewhere if path != "/dev/null" and not path.startswith("/proc/")} == set()
    status = json.loads(edgewater("status", "--json", *words).stdout)
    assert status["dead_letters"] > 0, "names that are none were refused"
    assert (outside / "secret.jsonl").read_bytes() == secret % 1

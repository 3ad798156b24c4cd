"""Start the processes of one gateway, restart what dies, stop all of it cleanly.

child ends with     then
0                   it is done (its sources are drained); restarted if it has no end of its own
75                  it was told to end by somebody else; restarted, and no error
2, 3                wrong configuration, or refused for safety: everything stops with that code
anything else       restarted after 0.5 s, doubling to 60 s; a minute of life resets the wait
stop asked          SIGTERM, and SIGKILL to what still lives after 18 s
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["STOPPED_EARLY", "Child", "Supervisor"]

STOPPED_EARLY = 75  # EX_TEMPFAIL
MAX_ERRORS = 5
FIRST_WAIT_S, LONGEST_WAIT_S, HEALTHY_S = 0.5, 60.0, 60.0
STOP_S = 18.0  # a service manager expects an end within 20 s
POLL_S = 0.1
log = logging.getLogger("edgewater.run")


class Child:
    """One supervised process.

    Args:
        name: For logs: "ingest", "trainer".
        arguments: Of the `edgewater` command.
        reports: Called with each JSON line that it prints on stdout; None leaves stdout alone.
        stdin: Whether it inherits standard input.
        patient: Restart it for ever (a daemon); else give up on an error that keeps coming back.
        ends: Whether exit code 0 means that it is done; the trainer ends only when it is asked to.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        reports: Callable[[dict[str, Any]], None] | None = None,
        *,
        stdin: bool = False,
        patient: bool = True,
        ends: bool = True,
    ) -> None:
        self.name = name
        self.done = False
        self.restarts = 0
        self._arguments = list(arguments)
        self._reports = reports
        self._stdin = stdin
        self._patient = patient
        self._ends = ends
        self._errors = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._wait_s = FIRST_WAIT_S
        self._due = 0.0

    @property
    def pid(self) -> int | None:
        """Its process id while it lives."""
        return self._process.pid if self._process is not None else None

    def look(self, now: float) -> int | None:
        """Start it when it is due, notice when it ended.

        Returns: An exit code that must end everything, else None.
        """
        if self.done:
            return None
        if self._process is None:
            if now >= self._due:
                self._start(now)
            return None
        code = self._process.poll()
        if code is None:
            return None
        self._process = None
        if code == 0 and self._ends:
            self.done = True
            return None
        if code in (2, 3):
            return code
        if now - self._started > HEALTHY_S:
            self._wait_s, self._errors = FIRST_WAIT_S, 0
        self._errors += code > 0 and code != STOPPED_EARLY  # what came from outside is no error of its own
        if not self._patient and self._errors >= MAX_ERRORS:
            log.error("%s failed %d times", self.name, self._errors)
            return 1
        log.warning("%s ended with %d; starting it again in %.1f s", self.name, code, self._wait_s)
        self._due = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self.restarts += 1
        return None

    def terminate(self) -> None:
        """Ask it to end."""
        self.done = True
        if self._process is not None:
            self._process.terminate()

    def wait(self, deadline: float) -> int:
        """Wait for its end, kill it at the deadline. Returns: its exit code."""
        if self._process is None:
            return 0
        try:
            return self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.error("%s did not end in time: killed", self.name)
            self._process.kill()
            return self._process.wait()

    def _start(self, now: float) -> None:
        self._started = now
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *self._arguments],
            # Also after a restart: what the dead process had not read yet is still in the pipe.
            stdin=None if self._stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE if self._reports else sys.stderr,
            # A terminal's Ctrl-C goes to the supervisor alone, which stops everything in order.
            start_new_session=True,
            env={**os.environ, "EDGEWATER_SUPERVISOR": str(os.getpid())},
        )
        if self._reports:
            threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None and self._reports is not None
        with process.stdout as lines:
            for line in lines:
                try:
                    report = json.loads(line)
                except ValueError:
                    continue
                if isinstance(report, dict):
                    self._reports(report)


class Supervisor:
    """Runs children until they are done, one refuses, or `stop` is set."""

    def __init__(self, children: Sequence[Child], stop: threading.Event) -> None:
        self._children = list(children)
        self._stop = stop

    def run(self, finished: Callable[[], bool], watch: Callable[[], None] = lambda: None) -> int:
        """Supervise.

        Args:
            finished: Looked at while everything lives; True ends the run well.
            watch: Called about ten times a second, for progress.
        Returns: 0, or the code of the child that refused.
        """
        code = 0
        try:
            while not self._stop.is_set():
                for child in self._children:
                    code = child.look(time.monotonic()) or code
                watch()
                if code or finished():
                    break
                self._stop.wait(POLL_S)
        finally:
            self._end()
        return code

    def _end(self) -> None:
        deadline = time.monotonic() + STOP_S
        for child in self._children:
            child.terminate()
        for child in self._children:
            child.wait(deadline)

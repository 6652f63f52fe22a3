"""A program on a terminal of its own: what it prints, and keys that are pressed."""

from __future__ import annotations

import os
import pty
import select
import time
from collections.abc import Sequence

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Runs `command` on a pseudo-terminal, with which it has keyboard, screen and signals as a user's."""

    def __init__(self, command: Sequence[str]) -> None:
        self.screen = ""
        self._seen = 0
        self._pid, self._fd = pty.fork()
        if self._pid == 0:
            os.execvpe(command[0], list(command), {**os.environ, "TERM": "dumb", "PYTHONUNBUFFERED": "1"})

    def expect(self, text: str, seconds: float = 60) -> str:
        """What is printed from the last `expect` up to and with `text`."""
        deadline = time.monotonic() + seconds
        while (found := self.screen.find(text, self._seen)) < 0:
            assert self._read(deadline), f"{text!r} did not come after {self.screen[self._seen :]!r}"
        start, self._seen = self._seen, found + len(text)
        return self.screen[start : self._seen]

    def press(self, keys: str) -> None:
        """Type `keys`, control characters among them."""
        if keys == CTRL_C:
            # readline shows its prompt before it waits: a signal in between would go unnoticed.
            time.sleep(0.3)
        os.write(self._fd, keys.encode())

    def enter(self, line: str) -> None:
        """Type a line."""
        self.press(line + "\n")

    def wait(self, seconds: float = 60) -> int:
        """The exit code of the program, which has to end by itself."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        _, status = os.waitpid(self._pid, 0)
        os.close(self._fd)
        return os.waitstatus_to_exitcode(status)

    def _read(self, deadline: float) -> bool:
        """Take what was printed; False when the program closed its terminal."""
        ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing came after {self.screen[self._seen :]!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.screen += data.decode("utf-8", "replace").replace("\r", "")
        return bool(data)

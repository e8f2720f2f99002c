"""Says how far a command is: a bar on a terminal, elsewhere a line now and then."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_S = 15  # between two lines
REFRESH_S = 1  # between two looks of the bar, whose clock has to move


class Progress:
    """Counts what is done, out of `total`, while a `with` statement runs.

    It writes to stderr: tqdm's bar if that is a terminal. If not, it writes a line every 15 s with
    what is done and about how long the rest will take. Bar and line come from a thread of their
    own, so they come even while nothing is finished. What takes less than 15 s gets no line.
    """

    def __init__(self, what: str, total: int, unit: str = "tile", leave: bool = True) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, desc=what, unit=unit, leave=leave, smoothing=0, dynamic_ncols=True,
            disable=not terminal,
        )  # fmt: skip
        self._began, self._stop, self._said = time.monotonic(), threading.Event(), False
        every, show = (REFRESH_S, self._bar.refresh) if terminal else (LINE_S, self._line)
        self._thread = threading.Thread(target=self._show, args=[every, show], daemon=True)

    def update(self) -> None:
        """One more is done."""
        self.done += 1
        self._bar.update()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which is done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    def text(self, elapsed: float) -> str:
        """The line, after so many seconds: "sm_90: 57 of 226 tiles in 15 s, about 44 s left"."""
        counted = f"{self.done} of {self.total} {self.unit}{'' if self.total == 1 else 's'}"
        line = f"{self.what}: {counted} in {duration(elapsed)}"
        if 0 < self.done < self.total:
            left = elapsed * (self.total - self.done) / self.done
            line += f", about {duration(left)} left"
        return line

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()
        if self._said:
            self._line()

    def _show(self, every: float, show: Any) -> None:
        while not self._stop.wait(every):
            show()

    def _line(self) -> None:
        self._said = True
        print(self.text(time.monotonic() - self._began), file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "12 min", "3 h 5 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"

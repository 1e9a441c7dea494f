"""The image size at which a rate of answers can be held."""

from __future__ import annotations

from collections import deque
from statistics import median

COUNTED = 3  # answers that a change waits for
ROOM = 0.85  # of the time there is, which an answer at a larger size may be expected to take
# Answers after which a size that was too slow is tried again
FORGIVEN = 200


class Pace:
    """Chooses the image size, so that answers come `fps` times a second.

    Visual tokens and the encoder's work grow with the square of the size, so that is how the time
    of an answer is expected to change with it. The first answer at a size is not counted, since
    kernels are compiled in it.

    Args:
        fps: answers a second.
        largest: the size to begin with, in pixels.
        step: sizes are multiples of it.

    Attributes:
        size: for the next answer.
        behind: whether even the smallest size is too slow.
    """

    def __init__(self, fps: float, largest: int, step: int):
        self.target = 1 / fps
        self.largest, self.step = largest, step
        self.smallest = max(step, largest // 4 // step * step)
        self.size = largest
        self.behind = False
        self._ceiling = largest
        self._times: deque[float] = deque(maxlen=COUNTED)
        self._answers = -1  # at this size, without the first

    def took(self, seconds: float) -> bool:
        """Count an answer; whether the size, or whether it is `behind`, changes with it."""
        self._answers += 1
        if self._answers > 0:
            self._times.append(seconds)
        if self._answers and self._answers % FORGIVEN == 0:
            self._ceiling = self.largest
        if len(self._times) < COUNTED:
            return False
        usual = median(self._times)
        return self._smaller(usual) if usual > self.target else self._larger(usual)

    def _smaller(self, usual: float) -> bool:
        if self.size == self.smallest:
            was, self.behind = self.behind, True
            return not was
        self._ceiling = self.size - self.step
        fitting = int(self.size * (self.target / usual) ** 0.5) // self.step * self.step
        return self._take(max(self.smallest, min(fitting, self._ceiling)))

    def _larger(self, usual: float) -> bool:
        was, self.behind = self.behind, False
        size = self.size + self.step
        if size <= self._ceiling and usual * (size / self.size) ** 2 < ROOM * self.target:
            return self._take(size)
        return was

    def _take(self, size: int) -> bool:
        self.size = size
        self._times.clear()
        self._answers = -1
        return True

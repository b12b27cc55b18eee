"""Threads that compute in turns."""

import threading
from collections import deque


class Turns:
    """Lets one thread compute at a time; the one that has waited longest is next.

    A forward pass uses all cores, or the whole GPU, so that several at once would finish no
    earlier, and how long each took would tell of the others. A plain lock is not fair: the thread
    that releases it usually takes it again.

        with turns:          # wait for the first turn
            compute()
            turns.pass_on()  # let all the others have one
            compute()
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.queue: deque[object] = deque()  # the first one computes

    def __enter__(self) -> "Turns":
        ticket = object()
        with self.changed:
            self.queue.append(ticket)
            self.changed.wait_for(lambda: self.queue[0] is ticket)
        return self

    def __exit__(self, *exc: object) -> None:
        with self.changed:
            self.queue.popleft()
            self.changed.notify_all()

    def pass_on(self) -> None:
        """Let every thread that waits have a turn, then go on."""
        self.__exit__()
        self.__enter__()

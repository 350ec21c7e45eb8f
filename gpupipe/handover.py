"""Work and results that one thread hands to another, while Ctrl-C may come at any moment.

Ctrl-C raises KeyboardInterrupt between any two steps of the main thread. ``threading.Condition``, and so
``queue.Queue``, ``Future`` and ``ThreadPoolExecutor``, do not survive that: a lock stays taken, or a thread is not
woken, and what waits for it waits for ever. What ``queue.SimpleQueue`` does is one step, which is done or not.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE = 0.5
"""Seconds after which a thread that waits for room looks whether its reader has failed."""


class Inbox(Generic[Item]):
    """A queue of a thread's own, with room for some items.

    Args:
        room: how many items may wait.
    """

    def __init__(self, room: int) -> None:
        self._items: SimpleQueue[Item | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()
        for _ in range(room):
            self._room.put(None)

    def put(self, item: Item, error: Callable[[], BaseException | None]) -> None:
        """Put an item in once there is room; raise ``error()`` as soon as the reader has failed."""
        while (failure := error()) is None:
            with contextlib.suppress(Empty):
                self._room.get(timeout=_PATIENCE)
                self._items.put(item)
                return
        try:
            raise failure
        finally:
            del failure  # its traceback holds this frame

    def end(self) -> None:
        """Have the reader find None after all that is in; for this there is always room."""
        self._items.put(None)

    def get(self) -> Item | None:
        """Wait for the next item, and take it."""
        item = self._items.get()
        self._room.put(None)
        return item


class Answer(Generic[Result]):
    """What a call returns, once a thread has made it. One thread may wait for it.

    Attributes:
        done: whether it has come.
    """

    def __init__(self, function: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
        self._call: tuple[Callable[..., Result], tuple[Any, ...]] | None = (function, arguments)
        self._error: BaseException | None = None
        self._result: Any = None
        self._come: SimpleQueue[None] = SimpleQueue()
        self.done = False

    def wait(self) -> None:
        """Wait for it."""
        if not self.done:
            self._come.get()

    def result(self) -> Result:
        """Wait for what the call returns, or raise what it has raised."""
        self.wait()
        try:
            if self._error is not None:
                raise self._error
            return self._result
        finally:
            del self  # an error's traceback holds this frame

    def drop(self) -> None:
        """Do not make the call: who waits for it is told so."""
        self._error = RuntimeError("the thread that was asked has ended before")
        self.done = True
        self._come.put(None)

    def find(self, first: list[Callable[[], object]]) -> None:
        """Make the call, and before it those in ``first``, which are taken out."""
        assert self._call is not None
        (function, arguments), self._call = self._call, None
        come = self._come
        try:
            while first:
                first[-1]()
                first.pop()
            self._result = function(*arguments)
        except BaseException as error:
            self._error = error
        self.done = True
        del self, function, arguments  # an error's traceback holds this frame
        come.put(None)


class Workers:
    """Threads that make calls, begun as they are needed: a context, whose end is :meth:`end`.

    Args:
        threads: how many there are at most.
        name: what their names begin with.
        first: what each does before its first call.
    """

    def __init__(self, threads: int, name: str, first: Callable[[], object] | None = None) -> None:
        self._most = threads
        self._name = name
        self._first = first
        self._threads: list[threading.Thread] = []
        self._asked: SimpleQueue[Answer[Any] | None] = SimpleQueue()
        if threading.current_thread() is threading.main_thread():
            _open.add(self)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Answer[Result]:
        """Have a thread call a function."""
        if len(self._threads) < self._most:
            name = f"{self._name}_{len(self._threads)}"
            thread = threading.Thread(target=_work, args=(self._asked, self._first), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        answer = Answer(function, arguments)
        self._asked.put(answer)
        return answer

    def end(self) -> set[Answer[Any]]:
        """Make no call that has not begun, and wait for those that have; return the answers that are dropped."""
        dropped: set[Answer[Any]] = set()
        with contextlib.suppress(Empty):
            while (answer := self._asked.get_nowait()) is not None:
                dropped.add(answer)
                answer.drop()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            if thread.is_alive():  # one that Ctrl-C found starting may not be yet: it ends on its own
                thread.join()
        return dropped

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


_open: weakref.WeakSet[Workers] = weakref.WeakSet()
"""The main thread's. Other threads, if they are waited for at all, end theirs themselves."""


@atexit.register
def _end_all() -> None:
    """End what a program that ends has left open: threads that worked on, in an interpreter half gone, could crash."""
    for workers in list(_open):
        workers.end()


def _work(asked: SimpleQueue[Answer[Any] | None], first: Callable[[], object] | None) -> None:
    before = [] if first is None else [first]
    while (answer := asked.get()) is not None:
        answer.find(before)
        del answer  # and the frames that it holds

"""The engine in a thread of its own, and its events in the event loop."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable

from llama4_jax.serve.answers import Event
from llama4_jax.serve.engine import Engine
from llama4_jax.serve.options import Options
from llama4_jax.serve.requests import NOT_FINITE, Prompt
from llama4_jax.serve.warm import foreseen, warm
from llama4_jax.server.errors import ApiError

type Asked = list[tuple[Prompt, Options]]
"""Prompts and how each is answered."""


class Stream:
    """The events of a list of requests, as they come."""

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int) -> None:
        self._loop, self._left = loop, answers
        self._queue: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    def put(self, found: tuple[int, Event] | Exception) -> None:
        """Add an event with the index of its answer, from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, found)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield events, each with the index of its answer, until every answer has ended.

        Raises:
          ApiError: the engine has failed, or an answer could not be made.
        """
        while self._left:
            found = await self._queue.get()
            if isinstance(found, Exception):
                raise ApiError(500, f"the engine has stopped: {found}", code="engine_failed")
            if found[1].finish_reason == "failed":
                raise ApiError(500, NOT_FINITE, code="not_finite")
            self._left -= found[1].finish_reason is not None
            yield found


@dataclasses.dataclass
class _Place:
    """Where the events of a request go: its first answer's index, and how many have not ended."""

    stream: Stream
    first: int
    left: int


class Worker:
    """Step an engine while it has work; hand every event to whoever waits for it.

    Args:
      engine: its `step` is called by this thread alone.
      max_waiting: answers that may wait beyond those that the engine makes at once.
      warms: whether to compile what most traffic needs before anybody is served.
      observe: told of the events of every step.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_waiting: int,
        warms: bool,
        observe: Callable[[list[Event]], None],
    ) -> None:
        self.engine = engine
        self.failure: Exception | None = None
        self.num_open = 0  # answers that somebody waits for
        self._most = engine.config.max_rows + max_waiting
        self._observe, self._warms = observe, warms
        self._places: dict[int, _Place] = {}  # until all answers of a request have ended
        self._early: dict[int, list[Event]] = {}  # of requests whose number is not known yet
        self._lock = threading.Lock()
        self._ends, self._is_warm = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        # Reading a request means encoding its texts and decoding its images.
        self._readers = concurrent.futures.ThreadPoolExecutor(2, "read")

    @property
    def is_ready(self) -> bool:
        """Are requests served?"""
        return self._is_warm.is_set() and self.failure is None

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def close(self) -> None:
        """Stop after the step under way."""
        self._ends.set()
        self._readers.shutdown()
        self._thread.join()
        self.engine.close()

    async def read[T](self, work: Callable[[], T]) -> T:
        """Do the host's part of a request beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    @contextlib.asynccontextmanager
    async def answer(self, asked: Asked) -> AsyncIterator[Stream]:
        """Submit requests; their events come from what this gives. Leaving early cancels them.

        Raises:
          ApiError: too many wait already, or the engine has failed.
          ValueError: a request could not be served.
        """
        if self.failure is not None:
            raise ApiError(503, f"the engine has stopped: {self.failure}", code="engine_failed")
        answers = sum(options.n for _, options in asked)
        if self.num_open + answers > self._most:
            raise ApiError(
                429,
                f"{self.num_open} answers are being made or wait, of at most {self._most}; try "
                "again in a moment.",
                code="queue_full",
                headers={"retry-after": "1"},
            )
        stream = Stream(asyncio.get_running_loop(), answers)
        submitted = self._readers.submit(self._submit, asked, stream)
        self.num_open += answers
        try:
            await asyncio.shield(asyncio.wrap_future(submitted))
            yield stream
        finally:
            self.num_open -= answers
            submitted.add_done_callback(self._leave)

    def _submit(self, asked: Asked, stream: Stream) -> list[int]:
        numbers: list[int] = []
        first = 0
        for prompt, options in asked:
            try:
                number = self.engine.submit(prompt, options)
            except ValueError:
                for number in numbers:
                    self.engine.cancel(number)
                raise
            numbers.append(number)
            with self._lock:
                self._places[number] = _Place(stream, first, options.n)
                for event in self._early.pop(number, []):
                    self._hand(event)
            first += options.n
        return numbers

    def _leave(self, submitted: "concurrent.futures.Future[list[int]]") -> None:
        """Cancel what has not ended."""
        for number in [] if submitted.exception() is not None else submitted.result():
            if number in self._places:
                self.engine.cancel(number)

    def _hand(self, event: Event) -> None:
        place = self._places.get(event.request)
        if place is None:
            self._early.setdefault(event.request, []).append(event)
            return
        place.stream.put((place.first + event.choice, event))
        place.left -= event.finish_reason is not None
        if not place.left:
            del self._places[event.request]

    def _run(self) -> None:
        try:
            if self._warms:
                warm(self.engine)
                self.engine.compile_beside(foreseen(self.engine))
        except Exception as error:  # noqa: BLE001  those who wait are told
            self._fail(error)
            return
        self._is_warm.set()
        while not self._ends.is_set():
            if not self.engine.wait(timeout=0.1):
                continue
            try:
                events = self.engine.step()
            except Exception as error:  # noqa: BLE001  whatever it is, those who wait are told
                self._fail(error)
                return
            with self._lock:
                for event in events:
                    self._hand(event)
            self._observe(events)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        with self._lock:
            for place in self._places.values():
                place.stream.put(error)

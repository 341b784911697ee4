"""Turn a request to stop into an answer that the training loop reads between two steps."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax
from jax.experimental import multihost_utils


@dataclass
class StopRequest:
    """Whether somebody has asked the run to stop.

    Attributes:
        signal_number: Of the signal that asked, in whichever process, or None.
    """

    signal_number: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether to stop after this step: in all processes after the same one.

        Several processes call this at every step. A signal to one of them reaches the others
        while they go on, and all stop after a step that none has passed.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.signal_number = self.signal_number or signal.SIGTERM
            return True
        return jax.process_count() == 1 and self.signal_number is not None


@contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Note SIGTERM and the first SIGINT instead of dying of them.

    A second SIGINT interrupts at once, as usual. The previous handlers come back at the end. In a
    thread other than the main one signals cannot be handled and nothing is noted.

    In several processes SIGTERM is JAX's, which tells the other processes of it: a handler of ours
    would replace JAX's without a word. SIGINT is passed on as SIGTERM.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    is_alone = jax.process_count() == 1
    caught = (signal.SIGTERM, signal.SIGINT) if is_alone else (signal.SIGINT,)
    previous = {number: signal.getsignal(number) for number in caught}

    def note(signum: int, _frame: object) -> None:
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
        request.signal_number = signum
        if not is_alone:
            signal.raise_signal(signal.SIGTERM)

    try:
        for number in previous:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

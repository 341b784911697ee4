import signal
import threading

import pytest

from llama4_jax.train.interrupt import catch_stop_signals


def handlers():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_come_back(number):
    before = handlers()
    with catch_stop_signals() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
    assert handlers() == before


@pytest.fixture
def _interruptible():
    """Python's own handler, which a process started in the background lacks: it ignores SIGINT."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_interrupt_interrupts_at_once():
    before = handlers()
    with pytest.raises(KeyboardInterrupt), catch_stop_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert handlers() == before


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def work():
        with catch_stop_signals() as stop:
            found.append((stop.requested, handlers()))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]

import signal
import socket
import subprocess
import sys
import threading

import pytest

from llama4_jax.train.interrupt import catch_stop_signals


def handlers():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_come_back(number):
    before = handlers()
    with catch_stop_signals() as stop:
        assert not stop.is_due(1)
        signal.raise_signal(number)
        assert stop.is_due(2) and stop.signal_number == number
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
            found.append((stop.is_due(1), handlers()))

    before = handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


PROCESS = """
import signal, sys, time
import jax
# A child of a shell without a terminal ignores SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
address, index = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(index))
from llama4_jax.train.interrupt import catch_stop_signals
with catch_stop_signals() as stop:
    step = 0
    while step < 2000 and not stop.is_due(step):
        step += 1
        if step == 3:
            print("under way", flush=True)
        time.sleep(0.02 * (1 + int(index)))  # one is faster
print(step, stop.signal_number, flush=True)
"""


@pytest.fixture
def pair():
    """Two processes of one training, and the means to end them whatever happens."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    pair = [
        subprocess.Popen(
            [*command, index],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for index in "01"
    ]
    yield pair
    for process in pair:
        process.kill()
        process.wait()


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(pair):
    for process in pair:
        assert process.stdout.readline() == "under way\n"
    pair[1].send_signal(signal.SIGINT)
    (step, first), (other, second) = (process.communicate()[0].split() for process in pair)
    assert step == other and int(step) < 2000
    assert (int(first), int(second)) == (signal.SIGTERM, signal.SIGINT)

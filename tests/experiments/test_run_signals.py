import signal
import subprocess
import sys
import threading

from experiments.run.signals import StopFlag

PROGRAM = """
import sys, time
from experiments.run.signals import StopFlag
stop = StopFlag().install()
assert "jax" not in sys.modules and not stop.requested and stop.requested_at is None
began = time.monotonic()
print("ready", flush=True)
while not stop.requested:
    time.sleep(0.01)
assert began <= stop.requested_at <= time.monotonic()
sys.exit(75)
"""


def test_sigterm_ends_the_loop_in_good_order():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75, said
    assert "SIGTERM" in said


def test_the_handler_that_was_there_is_called_and_given_back():
    seen = []
    original = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    earlier = signal.getsignal(signal.SIGUSR1)
    try:
        stop = StopFlag().install(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        first = stop.requested_at
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
        assert stop.requested_at == first
        assert seen == [signal.SIGUSR1, signal.SIGUSR1]
        stop.uninstall()
        assert signal.getsignal(signal.SIGUSR1) is earlier
    finally:
        signal.signal(signal.SIGUSR1, original)


def test_sigint_is_left_alone():
    before = signal.getsignal(signal.SIGINT)
    stop = StopFlag().install()
    try:
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        stop.uninstall()


def test_another_thread_is_told():
    errors = []

    def install():
        try:
            StopFlag().install()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert errors
    assert "main thread" in errors[0]

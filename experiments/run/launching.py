"""Several processes of one command on this machine, from start to end."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from effjax.errors import Preempted
from experiments.run.processes import COORDINATOR, COUNT, INDEX
from experiments.run.signals import StopFlag

# How long the others have to end by themselves once one has failed.
GRACE_SECONDS = 60.0
TICK_SECONDS = 0.2


def run(command: Sequence[str], processes: int, devices: int, stop: StopFlag) -> int:
    """Starts a module so many times; returns 0, or the exit code of the first that failed."""
    address = f"localhost:{_free_port()}"
    children = [_start(command, address, processes, index, devices) for index in range(processes)]
    threads = [
        threading.Thread(target=_show, args=(child, index), daemon=True)
        for index, child in enumerate(children)
    ]
    for thread in threads:
        thread.start()
    try:
        code = _wait(children, stop)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for thread in threads:
            thread.join()
    return code


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    return port


def _start(
    command: Sequence[str], address: str, processes: int, index: int, devices: int
) -> subprocess.Popen:
    environment = os.environ | {COORDINATOR: address, COUNT: str(processes), INDEX: str(index)}
    if devices > 1:
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        (sys.executable, "-m", *command), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def _show(child: subprocess.Popen, index: int) -> None:
    """Passes on what a process prints."""
    assert child.stdout is not None
    before = b"" if index == 0 else f"[{index}] ".encode()
    for line in child.stdout:
        sys.stdout.buffer.write(before + line)
        sys.stdout.flush()


def _wait(children: Sequence[subprocess.Popen], stop: StopFlag) -> int:
    """Until all have ended, or one has failed and the others had their time to."""
    told, deadline, failed = False, None, 0
    while True:
        codes = [child.poll() for child in children]
        if stop.requested and not told:
            told = True
            for child in children:
                child.terminate()
        wrong = [(index, code) for index, code in enumerate(codes) if code not in (None, 0)]
        if wrong and deadline is None:
            index, failed = wrong[0]
            deadline = time.monotonic() + GRACE_SECONDS
            if failed != Preempted.exit_code:
                how = f"was killed by signal {-failed}" if failed < 0 else f"ended with exit code {failed}"
                print(f"process {index} {how}; waiting for the others", file=sys.stderr, flush=True)
        if None not in codes:
            return 128 - failed if failed < 0 else failed
        if deadline is not None and time.monotonic() > deadline:
            running = ", ".join(str(index) for index, code in enumerate(codes) if code is None)
            print(f"stopping process {running}, still running after {GRACE_SECONDS:.0f} s", file=sys.stderr)
            return 128 - failed if failed < 0 else failed
        time.sleep(TICK_SECONDS)

"""SIGTERM, SIGHUP and Ctrl-C end a command: one line, an exit code, nothing half written."""

import _thread
import atexit
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

#: What batch systems send, a terminal that closes, Ctrl-C -> what Python does by itself.
STOPPING: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
WORKER = "DataLoader worker"  # what torch calls a process that prepares batches


@contextmanager
def stopping(received: list[int]) -> Iterator[None]:
    """Let the first of some signals raise KeyboardInterrupt, and add it to `received`.

    Those that come after it change nothing any more, up to the end of the process. A signal that
    is ignored stays so: nohup sets this for SIGHUP.
    """
    report_unraisable = sys.unraisablehook

    def stop(number: int, _: Any) -> None:
        if not received:  # a second one does not disturb the clean-up
            received.append(number)
            atexit.register(_hear_nothing)  # called first: libraries have much to do at the end
            sys.unraisablehook = pass_on
            raise KeyboardInterrupt

    def pass_on(unraisable: Any) -> None:
        # where Python drops errors, in __del__ above all; those of other kinds are of no interest
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.1, _thread.interrupt_main, [received.pop()])
            again.daemon = True
            again.start()

    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [each for each, usual in STOPPING.items() if signal.getsignal(each) is usual]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, STOPPING[number])
        sys.unraisablehook = report_unraisable


def _hear_nothing() -> None:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def were_behind(error: Exception, received: list[int]) -> bool:
    """Tell whether a signal is behind an error: it may reach the processes of a loader first."""
    if not received and WORKER in str(error):
        with suppress(KeyboardInterrupt):
            time.sleep(1)
    return bool(received)


def said(received: list[int], has_checkpoints: bool) -> tuple[str, int]:
    """Message and exit code after a signal, which shells know as 128 and its number."""
    number = signal.Signals(received[0]) if received else signal.SIGINT
    how = f" by {number.name}" if number != signal.SIGINT else ""
    again = "; it goes on from its last checkpoint" if has_checkpoints else ""
    return f"interrupted{how}; run the same command again{again}.", 128 + number

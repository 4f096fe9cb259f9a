"""SIGTERM and SIGHUP end a command as Ctrl-C does: one line, an exit code, nothing half written."""

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = (signal.SIGTERM, signal.SIGHUP)  # what batch systems send, and a terminal that closes
WORKER = "DataLoader worker"  # what torch calls a process that prepares batches


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP do what Ctrl-C does; yield a list that gets the one received.

    A signal that is ignored stays so: nohup sets this for SIGHUP.
    """
    received: list[int] = []
    report_unraisable = sys.unraisablehook

    def stop(number: int, _: Any) -> None:
        if not received:  # a second one does not disturb the clean-up
            received.append(number)
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
        mine = [each for each in STOPPING if signal.getsignal(each) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        sys.unraisablehook = report_unraisable


def were_behind(error: Exception, received: list[int]) -> bool:
    """Tell whether a signal is behind an error: it may reach the processes of a loader first."""
    if not received and WORKER in str(error):
        with suppress(KeyboardInterrupt):
            time.sleep(1)
    return bool(received)


def said(received: list[int], has_checkpoints: bool) -> tuple[str, int]:
    """Message and exit code after a signal, which shells know as 128 and its number."""
    number = signal.Signals(received[0]) if received else signal.SIGINT
    how = f" by {number.name}" if received else ""
    again = "; it goes on from its last checkpoint" if has_checkpoints else ""
    return f"interrupted{how}; run the same command again{again}.", 128 + number

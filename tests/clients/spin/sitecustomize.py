"""Lets a test make a process of the engine spin: SIGUSR1 enters a loop that never ends.

Python imports this by itself from PYTHONPATH; the engine is unmodified.
"""

import signal


def _spin(_number, _frame):
    while True:
        pass


signal.signal(signal.SIGUSR1, _spin)

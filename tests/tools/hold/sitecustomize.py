"""Stops a run of a step at a known point.

Python imports this file when it starts and PYTHONPATH names its folder. HOLD_AT is a regular
expression for one of Python's audit events and what it is about: `os.rename .*/kinetics_train.csv`
is a file about to get this name, `write .*` one about to be opened for writing. The process writes
what it came to into a file in HOLD_NOTES that is called by its number. Then it waits until
HOLD_NOTES/go is there, or with HOLD_HOW=kill kills itself, or with HOLD_HOW=note goes on. Workers
inherit all of it.
"""

import os
import re
import signal
import sys
import time

AT, NOTES, HOW = re.compile(os.environ['HOLD_AT']), os.environ['HOLD_NOTES'], os.environ['HOLD_HOW']
EVENTS = {'open': 0, 'os.rename': 1, 'fcntl.flock': 1}  # which of its arguments AT is matched with

# pytest ignores Ctrl-C in the background and SIGHUP under nohup; a step would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def hold(event: str, arguments: tuple) -> None:
    if event not in EVENTS:
        return
    about = arguments[EVENTS[event]]
    if event == 'open' and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        event = 'write'
    about = os.fsdecode(about) if isinstance(about, (str, bytes, os.PathLike)) else about
    if not AT.search(f'{event} {about}') or os.path.exists(f'{NOTES}/go'):
        return
    note = os.open(f'{NOTES}/{os.getpid()}', os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(note, f'{about}\n'.encode(errors='replace'))
    os.close(note)
    if HOW == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    while HOW == 'hold' and not os.path.exists(f'{NOTES}/go'):
        time.sleep(0.01)


sys.addaudithook(hold)

"""The one exception that is meant for the person at the keyboard."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do.

    Commands print it as one line and exit with status 2; library callers can catch it as a `ValueError`.
    """

"""Held-out metrics on fixed noise, and the intervals they are reported with."""

from advgrpo.runtime.callable_module import make_callable

make_callable(__name__)

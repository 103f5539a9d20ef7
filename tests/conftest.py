"""What all tests need of the process that they run in."""

import signal

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    # a shell has what it starts in the background ignore this; so would what is started here
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Functions run as somebody else, in a child process."""

import json
import os
import traceback
from collections.abc import Callable
from typing import Any


def as_user(
    uid: int, function: Callable[..., Any], *args: object, groups: tuple[int, ...] = ()
) -> Any:
    """Call a function as another user, and return what JSON can carry of its result.

    The child is a fork, so the function may use what is imported already, even from places that
    the user can't read.

    Raises:
        AssertionError: the function raised; the text is its traceback.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setgid(uid)
            os.setuid(uid)
            answer = {"result": function(*args)}
            status = 0
        except BaseException:  # nothing may leave the child but by the pipe
            answer = {"error": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(status)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text)
    if "error" in answer:
        raise AssertionError(answer["error"])
    return answer["result"]

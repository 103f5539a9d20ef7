"""Whatever bytes come, and however they are cut: a value or an error, and nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfsmap.daemon.varlink import (
    Framer,
    Message,
    RawReply,
    decode,
    error_of,
)
from vfsmap.errors import ProtocolError, VfsmapError
from vfsmap.testing.fuzz import survive_message

CORPUS = sorted((Path(__file__).parents[1] / "data" / "varlink").glob("*.bin"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
MESSAGES = st.lists(st.binary(max_size=40).map(lambda raw: raw.replace(b"\0", b"")), max_size=6)


def whole(framer: Framer) -> Iterator[Message]:
    while message := framer.next():
        yield message


@given(MESSAGES, st.data())
def test_however_a_stream_is_cut_the_same_messages_come_out(
    messages: list[bytes], data: st.DataObject
) -> None:
    stream = b"".join(raw + b"\0" for raw in messages)
    framer = Framer()
    found = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        framer.feed(stream[:size])
        stream = stream[size:]
        if data.draw(st.booleans()):
            found += [message.raw for message in whole(framer)]
    assert found + [message.raw for message in whole(framer)] == messages
    assert framer.is_empty


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.integers(0, 3)), max_size=8))
def test_each_descriptor_is_handed_out_or_abandoned_exactly_once(
    reads: list[tuple[bytes, int]],
) -> None:
    framer = Framer(message_max=30, descriptors_max=5)
    numbers = iter(range(1000))
    sent: list[int] = []
    handed: list[int] = []
    try:
        for data, count in reads:
            fresh = [next(numbers) for _ in range(count)]
            sent += fresh
            framer.feed(data, fresh)
            handed += [fd for message in whole(framer) for fd in message.descriptors]
    except ProtocolError:
        pass
    assert sorted(handed + framer.abandon()) == sent


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=6))
def test_who_sends_descriptors_with_a_message_of_its_own_gets_them_there(
    sends: list[tuple[bool, int]],
) -> None:
    # as the kernel reads: on over messages without descriptors, never past those with some
    framer = Framer()
    expected = []
    glued = b""
    for number, (with_some, count) in enumerate(sends):
        raw = b"m%d" % number
        descriptors = [10 * number + i for i in range(count)] if with_some else []
        expected.append(Message(raw, descriptors))
        glued += raw + b"\0"
        if with_some:
            framer.feed(glued, descriptors)
            glued = b""
    framer.feed(glued)
    assert list(whole(framer)) == expected


@given(st.binary(max_size=200))
@example(b'{"method":"a.b","parameters":{"x":1e999}}')
@example(b'{"method":"a.b","parameters":null,"more":null}')
def test_any_bytes_are_a_call_or_a_protocol_error(raw: bytes) -> None:
    survive_message(raw)


@given(JSON, JSON)
def test_any_json_is_a_call_or_a_protocol_error(method: Any, parameters: Any) -> None:
    survive_message(json.dumps({"method": method, "parameters": parameters}).encode())
    survive_message(json.dumps({"method": "a.B", "parameters": parameters}).encode())
    survive_message(json.dumps(parameters).encode())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_once_was_trouble_is_none_now(path: Path) -> None:
    framer = Framer()
    try:
        framer.feed(path.read_bytes())
    except ProtocolError:
        framer.abandon()
    for message in whole(framer):
        survive_message(message.raw)


@given(st.text(max_size=60), st.dictionaries(st.text(max_size=10), JSON, max_size=4))
@example("io.vfsmap.Mapping.Busy", {"message": None, "__class__": 1})
def test_any_error_reply_becomes_a_vfsmap_error(error: str, parameters: dict[str, Any]) -> None:
    found = error_of(error, parameters)
    assert isinstance(found, VfsmapError)
    assert str(found)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_reply_or_a_protocol_error(raw: bytes) -> None:
    try:
        reply = decode(raw, RawReply)
    except ProtocolError:
        return
    assert reply.error is None or isinstance(reply.error, str)

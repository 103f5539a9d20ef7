import msgspec
import pytest

from vfsmap import errors
from vfsmap.daemon.calls import LeaseCall, MapCall
from vfsmap.daemon.varlink import (
    CALL_MAX,
    INTERFACE,
    Call,
    Framer,
    Message,
    RawReply,
    Reply,
    VarlinkError,
    declared_errors,
    decode,
    decode_parameters,
    encode,
    encode_parameters,
    error_of,
    error_reply,
)
from vfsmap.errors import (
    Busy,
    Damaged,
    NotAligned,
    PoolInUse,
    ProtocolError,
    Untrusted,
    VfsmapError,
)


def whole(framer: Framer) -> list[Message]:
    found = []
    while message := framer.next():
        found.append(message)
    return found


def test_a_message_ends_with_a_nul_byte_and_not_before() -> None:
    framer = Framer()
    framer.feed(b'{"a"')
    assert framer.next() is None
    assert framer.has_part
    framer.feed(b":1}\0")
    assert framer.next() == Message(b'{"a":1}', [])
    assert framer.is_empty


def test_messages_that_come_at_once_are_told_apart() -> None:
    framer = Framer()
    framer.feed(b"one\0two\0thr")
    assert [m.raw for m in whole(framer)] == [b"one", b"two"]
    assert not framer.is_empty
    framer.feed(b"ee\0")
    assert [m.raw for m in whole(framer)] == [b"three"]


def test_descriptors_belong_to_the_message_that_holds_the_last_byte_they_came_with() -> None:
    framer = Framer()
    framer.feed(b"without\0with\0", [7])
    framer.feed(b"also without\0begun", [8, 9])
    framer.feed(b" and ended\0")
    assert whole(framer) == [
        Message(b"without", []),
        Message(b"with", [7]),
        Message(b"also without", []),
        Message(b"begun and ended", [8, 9]),
    ]


def test_descriptors_without_a_byte_wait_for_their_message() -> None:
    framer = Framer()
    framer.feed(b"", [5])
    assert framer.has_part
    framer.feed(b"late\0")
    assert framer.next() == Message(b"late", [5])


def test_a_message_of_the_largest_size_passes_and_one_byte_more_does_not() -> None:
    framer = Framer(message_max=10)
    framer.feed(b"0123456789\0")
    assert framer.next() == Message(b"0123456789", [])
    with pytest.raises(ProtocolError, match="more than 10 bytes"):
        framer.feed(b"0123456789a\0")


def test_half_a_message_can_not_grow_for_ever() -> None:
    framer = Framer()
    for _ in range(CALL_MAX):
        framer.feed(b"x")
    with pytest.raises(ProtocolError, match="more than"):
        framer.feed(b"x")


def test_too_many_descriptors_are_refused_and_can_still_be_closed() -> None:
    framer = Framer(descriptors_max=3)
    framer.feed(b"a\0", [10])
    framer.feed(b"b", [11, 12])
    with pytest.raises(ProtocolError, match="more than 3 descriptors"):
        framer.feed(b"c", [13, 14])
    assert sorted(framer.abandon()) == [10, 11, 12, 13, 14]
    assert framer.is_empty


def test_a_call_is_encoded_as_the_specification_has_it() -> None:
    call = Call("org.example.Do", encode_parameters({"x": 1}), more=True)
    assert encode(call) == b'{"method":"org.example.Do","parameters":{"x":1},"more":true}\0'
    assert encode(Reply()) == b"{}\0"
    assert encode(Reply({"y": 2}, continues=True)) == b'{"parameters":{"y":2},"continues":true}\0'


def test_unknown_members_of_a_call_are_ignored_and_wrong_types_are_not() -> None:
    call = decode(b'{"method":"a.B","extension":[1]}', Call)
    assert call.method == "a.B"
    assert bytes(call.parameters) == b"{}"
    for raw in (b'{"method":1}', b'{"method":"a","more":1}', b"{}", b"[]", b"null", b'"a"'):
        with pytest.raises(ProtocolError):
            decode(raw, Call)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b'{"method":"\xff"}',
        b"[" * 60_000,
        b'{"method":"a.B","parameters":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"method":"a.B","parameters":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"method":"a.B"}{"method":"a.B"}',
        b'{"method":NaN}',
    ],
)
def test_what_is_no_call_is_a_protocol_error_however_deep_it_is_nested(raw: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a varlink Call"):
        decode(raw, Call)


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b'{"offset":-1}', "offset"),
        (b'{"offset":1.5}', "offset"),
        (b'{"offset":"1"}', "offset"),
        (b'{"offset":true}', "offset"),
        (b'{"length":9223372036854775808}', "length"),
        (b'{"length":' + b"9" * 6000 + b"}", "length"),
        (b'{"writable":1}', "writable"),
        (b'{"file":[' + b"[" * 50 + b"]" * 50 + b"]}", "file"),
        (b'{"path":"' + b"x" * 5000 + b'"}', "path"),
        (b'{"unknown":1}', "unknown"),
        (b"[1]", "parameters"),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(raw: bytes, name: str) -> None:
    with pytest.raises(VarlinkError) as refused:
        decode_parameters(Call("a", encode_raw(raw)).parameters, MapCall)
    assert refused.value.name == "org.varlink.service.InvalidParameter"
    assert refused.value.parameters == {"parameter": name}


def encode_raw(raw: bytes) -> msgspec.Raw:
    return decode(b'{"method":"a","parameters":' + raw + b"}", Call).parameters


def test_a_missing_parameter_is_named_and_null_means_none_given() -> None:
    with pytest.raises(VarlinkError) as refused:
        decode_parameters(encode_parameters({}), LeaseCall)
    assert refused.value.parameters == {"parameter": "lease"}
    assert decode_parameters(encode_parameters(None), MapCall) == MapCall()


@pytest.mark.parametrize("name", sorted(declared_errors()))
def test_each_declared_error_arrives_as_the_class_it_left_as(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, VfsmapError)
    error = kind.__new__(kind)
    Exception.__init__(error, "what was wrong")
    received = over_the_wire(error)
    assert type(received) is kind
    assert str(received) == "what was wrong"


def over_the_wire(error: VfsmapError) -> VfsmapError:
    reply = decode(encode(error_reply(error))[:-1], RawReply)
    assert reply.error is not None
    return error_of(reply.error, msgspec.json.decode(reply.parameters))


def test_an_errors_fields_travel_with_it() -> None:
    received = over_the_wire(NotAligned("offset", 5, 4096))
    assert isinstance(received, NotAligned)
    assert (received.value, received.align) == (5, 4096)
    assert str(received) == "offset 0x5 is not a multiple of 0x1000"


def test_an_error_that_is_not_declared_goes_by_its_nearest_declared_base() -> None:
    assert type(over_the_wire(PoolInUse("elsewhere"))) is Busy
    assert type(over_the_wire(Untrusted("who"))) is Untrusted
    assert type(over_the_wire(Damaged("what"))) is Damaged


def test_an_error_that_names_a_file_of_any_bytes_can_be_told() -> None:
    assert str(over_the_wire(Busy("caf\udce9"))) == "caf?"


@pytest.mark.parametrize(
    "error",
    [
        "org.varlink.service.MethodNotFound",
        f"{INTERFACE}.NoSuchError",
        f"{INTERFACE}.ClassVar",
        f"{INTERFACE}.__name__",
        "",
        "Busy",
    ],
)
def test_an_error_that_this_client_does_not_know_is_a_protocol_error(error: str) -> None:
    assert type(error_of(error, {"message": "m"})) is ProtocolError

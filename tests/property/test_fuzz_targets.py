"""Whatever bytes a client sends or a pool holds: an error of ours at worst."""

import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfsmap.testing.fuzz import TARGETS, corpus, fuzz_pool, fuzz_protocol

KEPT = [(target, path) for target in TARGETS for path in sorted(corpus(target).glob("*.bin"))]
WORDS = st.integers(0, 300) | st.integers(0, 1 << 64).map(lambda n: n & (1 << 64) - 1)
PAYLOADS = st.binary(max_size=100) | st.lists(WORDS, max_size=10).map(
    lambda words: b"".join(word.to_bytes(8, "little") for word in words)
)
RECORDS = st.builds(
    lambda kind, oid, payload: bytes([kind, oid, len(payload)]) + payload,
    st.integers(0, 11),
    st.integers(0, 40),
    PAYLOADS,
)


def test_inputs_are_kept_for_every_target() -> None:
    assert {target for target, _ in KEPT} == set(TARGETS)


@pytest.mark.parametrize(("target", "path"), KEPT, ids=lambda value: getattr(value, "stem", value))
def test_what_once_was_interesting_is_survived(target: str, path: Path) -> None:
    TARGETS[target](path.read_bytes())


@given(st.binary(max_size=300))
def test_any_stream_is_survived(data: bytes) -> None:
    fuzz_protocol(data)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORDS, max_size=5).map(b"".join))
def test_any_records_with_a_valid_checksum_are_survived_and_mended(data: bytes) -> None:
    fuzz_pool(data)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.version_info >= (3, 14),
    reason="atheris has no wheel for this machine or Python",
)
@pytest.mark.parametrize("target", TARGETS)
def test_some_inputs_that_look_for_new_code_are_survived(target: str) -> None:
    assert importlib.util.find_spec("atheris"), "run make setup"
    command = [sys.executable, "-m", "vfsmap.testing.fuzz", target, "--runs", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""Names of any bytes, as people and as scripts get them."""

import json
import os
from pathlib import Path

import pytest

from vfsmap_tools.console import print_table
from vfsmap_tools.escaping import json_text, printable


@pytest.mark.parametrize(
    "name",
    ["model-1.bin", "ü, Ж, 猫 (2)", "\U0001f468\u200d\U0001f33e", "dev\\x2dsda", "می\u200cخ"],
)
def test_ordinary_names_are_printed_as_they_are(name: str) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"a\nb\tc\r", r"a\nb\tc\r"),
        (b"\x1b]0;title\x07\x7f", r"\x1b]0;title\x07\x7f"),
        ("\x85\x9b\u2028".encode(), r"\u0085\u009b\u2028"),
        ("\u202egpj.exe\u2066".encode(), r"\u202egpj.exe\u2066"),
        (b"\x80\xff\xc3", r"\x80\xff\xc3"),
    ],
)
def test_what_a_terminal_would_obey_is_an_escape(name: bytes, shown: str) -> None:
    assert printable(os.fsdecode(name)) == shown


@pytest.mark.parametrize("indent", [None, 2])
def test_json_is_exact_but_for_bytes_that_are_no_text(indent: int | None) -> None:
    exact = {"é\x1b\n": ["\U0001f480", "\\udcff", "\\", '\\"', 1.5, None], "n": {"2": "\\\\xff"}}
    assert json_text(exact, indent) == json.dumps(exact, indent=indent)
    odd = {"\udcff": ["\\\udc80\\", Path("\U0001f480\udcff\udcfe")]}
    expected = {r"\xff": [r"\\x80" "\\", "\U0001f480" r"\xff\xfe"]}
    assert json.loads(json_text(odd, indent)) == expected


def test_a_table_shows_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "size"), [("[red]:cat:[/]", 1), ("a\n\udcff", 2)])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split() for row in rows] == [["[red]:cat:[/]", "1"], [r"a\n\xff", "2"]]

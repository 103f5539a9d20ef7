"""Every command and every program that the documentation shows is run, and does what it shows."""

import os
from pathlib import Path

import pytest

from vfsmap.testing import documents, newcomer

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))
    if documents.steps(path.read_text())
)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_page_shows_is_what_happens(page: Path, tmp_path: Path) -> None:
    assert os.geteuid() == 0, "pages mount file systems; run this test as root"
    for result in documents.run(page.read_text(), tmp_path):
        if not result.as_shown:
            step = result.step
            pytest.fail(
                f"{page.relative_to(ROOT)}:{step.line}: {step.source}\nexit status "
                f"{result.status}, printed:\n{result.printed}\nthe page shows:\n{step.expected}",
                pytrace=False,
            )


def test_output_is_compared_but_for_numbers_and_what_is_left_out() -> None:
    assert documents.matches("12 files, 3M", "345 files,   7.5M")
    assert not documents.matches("12 files, 3M", "12 files, 3G")
    assert not documents.matches("12 files", "12 extents")
    assert documents.matches("first\n...\nlast", "first\na\nb\nlast")
    assert not documents.matches("first\n...\nlast", "first\na\nb")
    assert documents.matches("in ... seconds", "in about 3 seconds")


def test_a_page_is_cut_into_commands_with_what_they_print() -> None:
    page = """text
```console
$ one \\
> more
shown
$ two
```
<!-- not run: it takes a machine -->
```console
$ three
```
<!-- run: four -->
```python
five()
```
"""
    assert [(s.source, s.program, s.expected) for s in documents.steps(page)] == [
        ("one \\\nmore", False, "shown"),
        ("two", False, None),
        ("four", False, None),
        ("five()", True, None),
    ]


def test_a_command_fails_if_the_page_shows_an_error_and_only_then() -> None:
    failing = documents.Step(1, "x", False, "vfsmap: no such pool")
    assert documents.Result(failing, 1, "vfsmap: no such pool\n").as_shown
    assert not documents.Result(failing, 0, "vfsmap: no such pool\n").as_shown
    working = documents.Step(1, "x", False, None)
    assert not documents.Result(working, 1, "").as_shown


def test_the_newcomer_does_what_readme_says() -> None:
    readme = (ROOT / "README.md").read_text()
    done = " ".join(step.command for step in newcomer.STEPS)
    for command in ("apt-get install", "git clone", "make setup", "make demo"):
        assert command in readme
        assert command in done

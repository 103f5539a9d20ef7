"""Documentation that is run: the commands of a page, in order, in a machine of the page's own.

``/mnt`` is empty, and what a page changes in ``/etc`` and ``/usr`` is gone when it ends.

A page is Markdown.  Each ```` ```console ```` block is a session of a shell: what follows ``$ `` is
run, and what follows is what it should print.  Each ```` ```python ```` block is a program of its
own.  All of a page share one shell, hence its directory, files and mounts.  In what is printed, any
number or digest stands for any other, ``...`` in a line for anything, and a line of ``...`` for any
lines.  A command fails if, and only if, the page shows an error line of ours behind it.

``python -m vfsmap.testing.documents PAGE`` tells what every step does, and fails if one does not.

A block behind the line ``<!-- not run: why -->`` is left out; ``<!-- run: command -->`` runs a
command that readers need not see, which finds the source tree in ``$SOURCE``.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

_FENCE: Final = re.compile(r"^```(\w*)")
_REMARK: Final = re.compile(r"^<!-- (not run|run): (.*) -->$")
_NUMBER: Final = re.compile(r"\b(?:[0-9a-f]{12,}|0x[0-9a-f]+|\d[\d.,:]*\d?)([KMGT]?)\b")
_ERROR: Final = "vfsmap: "
_SOURCE: Final = Path(__file__).parents[2]
_PATIENCE: Final = 240.0
_NAMESPACES: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
_PRELUDE: Final = """\
set -u
# copies of mounts that others have made would keep their servers from ending
findmnt --raw --noheadings --types fuse.vfsmap --output TARGET | xargs --no-run-if-empty umount -l
mount -t tmpfs -o mode=755 docs /mnt
for tree in etc usr; do
  mkdir -p /mnt/.new/$tree /mnt/.work/$tree
  mount -t overlay -o lowerdir=/$tree,upperdir=/mnt/.new/$tree,workdir=/mnt/.work/$tree docs /$tree
done
export HOME=/mnt/.home; mkdir "$HOME"; cd "$HOME"
"""


class Step(NamedTuple):
    """One command, or one program."""

    line: int
    """Where in the page it is."""
    source: str
    program: bool
    """Whether it is Python."""
    expected: str | None
    """What it should print; None: anything."""

    @property
    def fails(self) -> bool:
        """Tell whether the page shows that it fails."""
        return self.expected is not None and self.expected.startswith(_ERROR)


class Result(NamedTuple):
    """What came of a step."""

    step: Step
    status: int
    printed: str

    @property
    def as_shown(self) -> bool:
        """Tell whether it is what the page says."""
        if (self.status != 0) != self.step.fails:
            return False
        return self.step.expected is None or matches(self.step.expected, self.printed)


def steps(page: str) -> list[Step]:
    """Return what is to be run of a page, in order."""
    found: list[Step] = []
    lines = iter(enumerate(page.splitlines(), 1))
    skipped = False
    for number, line in lines:
        if remark := _REMARK.match(line):
            skipped = remark[1] == "not run"
            if not skipped:
                found.append(Step(number, remark[2], False, None))
        elif fence := _FENCE.match(line):
            block = list(_block(lines))
            if not skipped and fence[1] == "console":
                found += _session(number + 1, block)
            elif not skipped and fence[1] == "python":
                found.append(Step(number + 1, "\n".join(block), True, None))
            skipped = False
    return found


def _block(lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line == "```":
            return
        yield line


def _session(first: int, block: list[str]) -> Iterator[Step]:
    source: list[str] = []
    shown: list[str] = []
    at = first
    for number, line in enumerate([*block, "$ "], first):
        if line.startswith("$ "):
            if source:
                yield Step(at, "\n".join(source), False, "\n".join(shown) or None)
            source, shown, at = [line[2:]], [], number
        elif line.startswith("> ") and not shown:
            source.append(line[2:])
        else:
            shown.append(line)


def matches(expected: str, printed: str) -> bool:
    """Tell whether a command has printed what a page shows."""
    pattern = []
    for line in _plain(expected):
        if line == "...":
            pattern.append(r"(?:.*\n)*?")
        else:
            pattern.append(r".*?".join(map(re.escape, line.split("..."))) + r"\n")
    return re.fullmatch("".join(pattern), "".join(f"{x}\n" for x in _plain(printed))) is not None


def _plain(text: str) -> list[str]:
    return [" ".join(_NUMBER.sub(r"#\1", line).split()) for line in text.strip().splitlines()]


def run(page: str, work: Path) -> list[Result]:
    """Run a page's steps as root, in mount and process namespaces that end with the last of them.

    Args:
        page: the text of the page.
        work: an empty directory, for scripts and output.
    """
    todo = steps(page)
    script = [_PRELUDE]
    for number, step in enumerate(todo):
        command = step.source
        if step.program:
            (work / f"{number}.py").write_text(step.source)
            command = f"python {work}/{number}.py"
        script.append(f"{{ {command}\n}} > {work}/{number}.out 2>&1; echo $? > {work}/{number}.rc")
    (work / "script").write_text("\n".join(script))
    path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
    with suppress(subprocess.TimeoutExpired):  # then a step has no status, and so is not as shown
        subprocess.run(
            [*_NAMESPACES, "bash", str(work / "script")],
            env={"PATH": path, "COLUMNS": "160", "SOURCE": str(_SOURCE)},
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
    return [
        Result(step, int(_read(work / f"{n}.rc") or 255), _read(work / f"{n}.out"))
        for n, step in enumerate(todo)
    ]


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def main() -> None:
    """Run a page, and print each step with what came of it; exit with 1 unless all is as shown."""
    with tempfile.TemporaryDirectory() as work:
        results = run(Path(sys.argv[1]).read_text(), Path(work))
    for result in results:
        step, status, printed = result
        verdict = "as shown" if result.as_shown else "NOT AS SHOWN"
        print(f"--- line {step.line}, status {status}, {verdict}\n{step.source}\n{printed}")
    sys.exit(not all(result.as_shown for result in results))


if __name__ == "__main__":
    main()

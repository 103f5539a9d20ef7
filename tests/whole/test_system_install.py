"""What ``vfsmap system install`` puts into the system: whole, clean, and gone again on request."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import pytest

from vfsmap.testing.commands import vfsmap
from vfsmap_tools.cli import main
from vfsmap_tools.completion import SHELLS
from vfsmap_tools.manpages import pages

ROOT = Path(__file__).parents[2]
PAGES = pages(main)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    vfsmap("system", "install", "--root", root)
    return root


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=env
    )


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if not p.is_dir())


def test_installing_again_changes_nothing_and_uninstalling_leaves_nothing(tmp_path: Path) -> None:
    first = vfsmap("system", "install", "--root", tmp_path).stdout
    before = everything(tmp_path)
    assert first.splitlines() == [str(tmp_path / name) for name in first_to_last(first, tmp_path)]
    vfsmap("system", "install", "--root", tmp_path)
    assert everything(tmp_path) == before == sorted(first_to_last(first, tmp_path))
    vfsmap("system", "uninstall", "--root", tmp_path)
    assert everything(tmp_path) == []


def first_to_last(listed: str, root: Path) -> list[str]:
    return [str(Path(line).relative_to(root)) for line in listed.splitlines()]


def test_uninstalling_leaves_what_somebody_has_changed(tmp_path: Path) -> None:
    vfsmap("system", "install", "--root", tmp_path)
    changed = tmp_path / "usr/local/lib/systemd/system/vfsmap-mount@.service"
    changed.write_text("# ours\n")
    assert f"{changed} is not as it was" in vfsmap("system", "uninstall", "--root", tmp_path).stdout
    assert everything(tmp_path) == [str(changed.relative_to(tmp_path))]


def test_the_prefix_moves_all_but_the_helpers(tmp_path: Path) -> None:
    vfsmap("system", "install", "--root", tmp_path, "--prefix", "/usr")
    names = everything(tmp_path)
    assert {"sbin/mount.fuse.vfsmap", "sbin/umount.fuse.vfsmap", "usr/bin/vfsmap"} <= set(names)
    assert all(name.startswith(("usr/", "sbin/")) for name in names)
    assert not any(name.startswith("usr/local") for name in names)


def test_links_and_units_run_this_very_installation(root: Path) -> None:
    program = Path(sys.executable).with_name("vfsmap")
    for name in ("sbin/mount.fuse.vfsmap", "sbin/umount.fuse.vfsmap", "usr/local/bin/vfsmap"):
        assert (root / name).readlink() == program
    for unit in (root / "usr/local/lib/systemd/system").glob("*.service"):
        assert f"ExecStart={program} " in unit.read_text()
        assert "@VFSMAP@" not in unit.read_text()


def test_whoever_may_not_write_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "sbin").write_text("not a directory")
    result = vfsmap("system", "install", "--root", tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"vfsmap: {tmp_path}/sbin")
    assert result.stderr.count("\n") == 1


# manual pages


def commands(command: click.Command, name: str = "vfsmap") -> list[str]:
    """Every command that can be typed, found independently of what makes the pages."""
    if not isinstance(command, click.Group):
        return [name]
    context = click.Context(command)
    below = [(sub, command.get_command(context, sub)) for sub in command.list_commands(context)]
    return [name, *(line for sub, c in below if c for line in commands(c, f"{name} {sub}"))]


def test_every_command_has_a_manual_page(root: Path) -> None:
    wanted = {name.replace(" ", "-") + ".1" for name in commands(main)}
    installed = {path.name for path in (root / "usr/local/share/man/man1").iterdir()}
    assert installed == wanted == set(PAGES)


def test_the_manual_pages_are_rendered_without_a_warning(root: Path) -> None:
    all_pages = sorted((root / "usr/local/share/man/man1").iterdir())
    for command in (("groff", "-man", "-ww", "-Tutf8"), ("mandoc", "-Tlint", "-Wwarning")):
        result = run(*command, *all_pages)
        assert not result.returncode, result.stdout
        assert not result.stderr


def test_a_manual_page_says_what_the_help_says(root: Path) -> None:
    page = root / "usr/local/share/man/man1/vfsmap-mount.1"
    shown = run("man", "--warnings", "-l", page, MANWIDTH="100", LC_ALL="C.UTF-8")
    assert not shown.stderr
    helped = vfsmap("mount", "--help").stdout
    for text in (
        r"mount \[OPTIONS\] POOL DIRECTORY",
        r"nobusypoll +do not poll for requests: less CPU, fewer requests a second\n",
        r"--promise \[process\|power\]",
        r"-h, --help",
    ):
        assert re.search(text, shown.stdout)
        assert re.search(text, helped)


def test_text_that_means_something_to_roff_is_masked() -> None:
    @click.command(help="Try it.\n\n.SH is no heading, 'x' is no request, \\fB is \\ and fB - x-y.")
    def trial() -> None:
        pass

    page = pages(trial, "trial")["trial.1"]
    shown = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou"],
        input=page,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not shown.stderr
    assert ".SH is no heading, 'x' is no request, \\fB is \\ and fB - x-y." in " ".join(
        shown.stdout.split()
    )


@pytest.mark.parametrize("name", commands(main))
def test_no_help_shows_a_mark_for_the_formatter(name: str) -> None:
    context = click.Context(main)
    command: click.Command | None = main
    for word in name.split()[1:]:
        assert isinstance(command, click.Group)
        command = command.get_command(context, word)
    assert command is not None
    assert "\\b" not in (command.help or "")


# completion


def completed(shell: str, root: Path, *words: str) -> set[str]:
    """Return what a shell offers for the last of the words, with its installed script."""
    script = {
        "bash": "share/bash-completion/completions/vfsmap",
        "zsh": "share/zsh/site-functions/_vfsmap",
        "fish": "share/fish/vendor_completions.d/vfsmap.fish",
    }[shell]
    path = root / "usr/local" / script
    ways = {
        "bash": f"""
            source {path}
            COMP_WORDS=({" ".join(words[:-1])} "{words[-1]}"); COMP_CWORD={len(words) - 1}
            _vfsmap_completion vfsmap; printf '%s\\n' "${{COMPREPLY[@]}}" """,
        "zsh": f"""
            compdef() {{ :; }}; _describe() {{ print -l ${{(P)@[-1]}} ${{(P)@[-2]}} }}
            compadd() {{ print -l $@ }}
            source {path}; words=({" ".join(words[:-1])} "{words[-1]}"); CURRENT={len(words)}
            _vfsmap_completion""",
        "fish": f"source {path}; complete -C '{' '.join(words)}'",
    }
    environment = {"PATH": f"{root}/usr/local/bin:{os.environ['PATH']}", "HOME": "/nonexistent"}
    result = run(shell, "-c", ways[shell], **environment)
    return {re.split(r"[:\t ]", line)[0] for line in result.stdout.splitlines()}


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes_commands_and_options(root: Path, shell: str) -> None:
    assert shutil.which(shell), f"install {shell}: tools/setup.sh"
    assert {"mount", "module"} <= completed(shell, root, "vfsmap", "mo")
    assert "--promise" in completed(shell, root, "vfsmap", "mount", "--p")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_installed_script_is_the_printed_one(root: Path, shell: str) -> None:
    printed = vfsmap("completion", shell).stdout
    assert printed in {path.read_text() for path in root.rglob("*vfsmap*") if path.is_file()}


def test_the_wheel_holds_what_is_installed(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, ROOT)
    result = run(*command)
    assert not result.returncode, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = ROOT / "tools/vfsmap_tools/shipped"
    assert {f"vfsmap_tools/shipped/{path.name}" for path in shipped.iterdir()} <= names

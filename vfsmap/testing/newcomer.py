"""A newcomer's way, on a fresh Debian, timed: README's commands, then the tutorial.

``python -m vfsmap.testing.newcomer --rounds 2 [--base DIR] [--json]``

A round copies a minimal Debian 12 that debootstrap has made, gives it a clone of what is committed
here, and follows README there, once as root and once as an ordinary user with sudo.  It all happens
in a mount and a process namespace of the round's own, so nothing stays mounted or running, however
it ends.  Root, debootstrap (Debian's package of that name) and a mirror of Debian and of PyPI are
needed; ``--copy`` gives the fresh machine what this one is told of them.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click

SOURCE: Final = Path(__file__).parents[2]
_NAMESPACES: Final = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
_MIRROR: Final = "http://deb.debian.org/debian"
_USERS: Final = ("root", "newcomer")
_PASSED_ON: Final = ("http_proxy", "https_proxy", "no_proxy")
_TUTORIAL: Final = ".venv/bin/python -m vfsmap.testing.documents docs/tutorial.md"
_SHOWN: Final = 40
"""Lines of what a failed step has printed."""

# a machine's devices and file systems; a container's would be the same
_PRELUDE: Final = """\
set -u
mount --make-rprivate /
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
mount -t sysfs sys sys
mount -t tmpfs -o mode=755 dev dev
for node in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0' 'fuse 10 229'; do
  set -- $node; mknod -m 666 "dev/$1" c "$2" "$3"
done
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=666 pts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=1777 tmp tmp
"""
_STEP: Final = """\
began=$EPOCHREALTIME
chroot . su -l {user} -c '{command}' > ../{name}.out 2>&1 < /dev/null
echo $? $began $EPOCHREALTIME > ../{name}.end
"""


class Step(NamedTuple):
    """One thing that a newcomer does."""

    name: str
    command: str
    by_root: bool = False
    """Whether an ordinary user has to ask root, or sudo, for it."""
    by_user: bool = False
    """Whether it makes sense for an ordinary user alone."""


STEPS: Final = (
    Step("tools", "apt-get update -qq && apt-get install -y -qq git make", by_root=True),
    Step("clone", "git clone -q /srv/vfsmap.git vfsmap"),
    Step("setup", "cd vfsmap && make setup"),
    Step("demo", "cd vfsmap && make demo"),
    Step("tutorial", f"cd vfsmap && {_TUTORIAL}", by_root=True),
    Step("complaints", "cd vfsmap && bash /srv/complaints", by_user=True),
)


COMPLAINTS: Final = (
    ("vfsmap mount ~/none ~/mnt", "make it with: vfsmap format"),
    ("vfsmap mount ~/pool ~/none", "make it with: mkdir"),
    ("vfsmap mount ~/mnt ~/mnt", "a pool is a regular file"),
    ("vfsmap mount ~/pool /opt", "mount on a directory of your own"),
    ("vfsmap mount ~/pool ~/mnt -o allow_other", "user_allow_other in /etc/fuse.conf"),
    ("vfsmap format /opt/new --size 16M", "name another place"),
    ("vfsmap format ~/pool --size 16M", "use --force"),
    ("vfsmap umount ~/mnt", "findmnt -t fuse.vfsmap"),
    ("vfsmap mount ~/pool ~/mnt; vfsmap mount ~/pool ~/mnt", "unmount it: vfsmap umount"),
    ("vfsmap mount ~/pool ~/other", "unmount it or stop that process first"),
    ("cd ~/mnt; vfsmap umount ~/mnt", "fuser -vm"),
    ("vfsmap umount ~/mnt; sudo mv /dev/fuse /dev/x; vfsmap mount ~/pool ~/mnt", "modprobe fuse"),
    ("sudo mv /dev/x /dev/fuse; sudo chmod 600 /dev/fuse; vfsmap mount ~/pool ~/mnt", "chmod 666"),
    (
        "sudo chmod 666 /dev/fuse; sudo mv /usr/bin/fusermount3 /; vfsmap mount ~/pool ~/mnt",
        "install the package fuse3",
    ),
    (
        "sudo mv /fusermount3 /usr/bin; sudo mount -t hugetlbfs -o mode=1777 huge ~/other;"
        " vfsmap format ~/other/pool --size 2G",
        "/sys/kernel/mm/hugepages",
    ),
    (
        "sudo sh -c 'apt-get remove -qq -y fuse2fs; mv /usr/bin/sudo /'; make setup",
        "have root do: apt-get install",
    ),
    ("mv .venv old; make demo", "run: make setup"),
)
"""What goes wrong for a newcomer, one thing after the other, and what he must be told to do."""
_COMPLAIN: Final = """\
export PATH=$PWD/.venv/bin:$PATH
mkdir -p ~/mnt ~/other; vfsmap format ~/pool --size 16M
hear() {
  said=$(eval "$1" 2>&1)
  case $said in *"$2"*) verdict=told;; *) verdict="NOT TOLD"; missing=1;; esac
  echo "$verdict: $1: $said"
}
"""


class Outcome(NamedTuple):
    """How a step of a round went."""

    round: int
    user: str
    step: str
    status: int
    seconds: float
    printed: str


def make_base(base: Path, mirror: str) -> None:
    """Make a minimal Debian 12, with sudo as its installer leaves it."""
    command = ["debootstrap", "--variant=minbase", "--include=ca-certificates,sudo", "bookworm"]
    partial = base.with_name(f"{base.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    done = subprocess.run([*command, partial, mirror], capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"debootstrap failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    partial.rename(base)


def _steps_of(user: str) -> list[Step]:
    return [step for step in STEPS if user != "root" or not step.by_user]


def run_round(base: Path, work: Path, number: int, user: str, copies: tuple[Path, ...]) -> bool:
    """Follow README as one user on a fresh machine; ``work`` gets what the steps print."""
    machine = work / "machine"
    subprocess.run(["cp", "-a", "--reflink=auto", base, machine], check=True)
    for path in (Path("/etc/resolv.conf"), Path("/etc/hosts"), *copies):
        if path.exists():
            target = machine / path.relative_to("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-aLT", "--remove-destination", path, target], check=True)
    clone = ("git", "clone", "-q", "--bare", SOURCE, machine / "srv/vfsmap.git")
    subprocess.run(clone, check=True)
    if user != "root":
        subprocess.run(["chroot", machine, "useradd", "-m", "-s", "/bin/bash", user], check=True)
        (machine / "etc/sudoers.d/newcomer").write_text(f"{user} ALL=(ALL) NOPASSWD: ALL\n")
    # git takes nothing from a local repository of somebody else's
    subprocess.run(["chroot", machine, "chown", "-R", f"{user}:", "/srv"], check=True)
    passed = {k: v for k, v in os.environ.items() if k.lower() in _PASSED_ON or k[:4] == "PIP_"}
    with (machine / "etc/environment").open("a") as file:
        file.writelines(f"{name}={value}\n" for name, value in passed.items())
    (machine / "srv/complaints").write_text(
        _COMPLAIN
        + "".join(f"hear {shlex.quote(line)} {shlex.quote(cure)}\n" for line, cure in COMPLAINTS)
        + "exit ${missing:-0}\n"
    )
    script = work / "script"
    script.write_text(_PRELUDE + "".join(_lines(user)))
    done = subprocess.run([*_NAMESPACES, "bash", script, machine], check=False)
    return done.returncode == 0


def _lines(user: str) -> Iterator[str]:
    for name, command, by_root, _ in _steps_of(user):
        if by_root and user != "root":
            command = f'sudo sh -c "{command}"'
        yield _STEP.format(name=name, user=user, command=command)


def read_outcomes(work: Path, number: int, user: str) -> Iterator[Outcome]:
    """Yield how each step that was begun has gone."""
    for step in STEPS:
        end = work / f"{step.name}.end"
        if end.exists():
            status, began, ended = end.read_text().split()
            printed = (work / f"{step.name}.out").read_text(errors="replace")
            seconds = round(float(ended) - float(began), 1)
            yield Outcome(number, user, step.name, int(status), seconds, printed)


@click.command()
@click.option("--rounds", type=int, default=1, show_default=True)
@click.option("--user", "users", type=click.Choice(_USERS), multiple=True, default=_USERS)
@click.option("--base", type=click.Path(path_type=Path), help="Keep the minimal Debian there.")
@click.option("--mirror", default=_MIRROR, show_default=True)
@click.option(
    "--copy",
    "copies",
    type=click.Path(path_type=Path, exists=True, resolve_path=True),
    multiple=True,
    help="Give the fresh machine this file or directory of ours, such as /etc/pip.conf.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
def main(
    rounds: int,
    users: tuple[str, ...],
    base: Path | None,
    mirror: str,
    copies: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Follow README on fresh machines, and print how long each step takes."""
    if os.geteuid():
        raise click.ClickException("a fresh machine is made by root: run this as root")
    if shutil.which("debootstrap") is None:
        raise click.ClickException("debootstrap is missing: apt-get install debootstrap")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="vfsmap-newcomer-", dir="/var/tmp") as scratch:
        made = (base or Path(scratch) / "base").absolute()
        if not made.exists():
            make_base(made, mirror)
        for number in range(1, rounds + 1):
            for user in users:
                work = Path(scratch) / f"{number}-{user}"
                work.mkdir()
                run_round(made, work, number, user, copies)
                ended = list(read_outcomes(work, number, user))
                outcomes += ended
                missing = {step.name for step in _steps_of(user)}
                missing -= {outcome.step for outcome in ended}
                if missing and not any(outcome.status for outcome in ended):
                    raise click.ClickException(
                        f"round {number} of {user} did not end {', '.join(sorted(missing))}"
                    )
                shutil.rmtree(work)
    failed = [outcome for outcome in outcomes if outcome.status]
    if as_json:
        print(json.dumps([outcome._asdict() for outcome in outcomes], indent=2))
    else:
        _print(outcomes, users)
    for outcome in failed:
        tail = "\n".join(outcome.printed.splitlines()[-_SHOWN:])
        print(f"{outcome.user}, {outcome.step}: status {outcome.status}\n{tail}", file=sys.stderr)
    sys.exit(bool(failed))


def _print(outcomes: list[Outcome], users: tuple[str, ...]) -> None:
    print(f"{'':10}" + "".join(f"{user:>24}" for user in users) + "  (seconds, median; all)")
    for step in STEPS:
        line = f"{step.name:10}"
        for user in users:
            times = [o.seconds for o in outcomes if (o.user, o.step) == (user, step.name)]
            every = ", ".join(map(str, times))
            line += f"{f'{statistics.median(times):.1f} ({every})' if times else '-':>24}"
        print(line)


if __name__ == "__main__":
    main()

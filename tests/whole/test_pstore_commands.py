"""The commands of ``vfsmap pstore``."""

import json
import lzma
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from vfsmap.pstore import Recorder, Region
from vfsmap.testing.regions import load_sample
from vfsmap_tools.pstore import pstore
from vfsmap_tools.pstore_follow import grow, settle

PSTORE = [sys.executable, "-m", "vfsmap_tools.pstore"]
RUN = [*PSTORE, "run"]
SAMPLES = Path(__file__).parents[1] / "data/ramoops"


def call(*words: object, status: int = 0, text: bytes = b"") -> Result:
    result = CliRunner().invoke(pstore, [str(word) for word in words], input=text)
    assert result.exit_code == status, result.output
    return result


def ask(*words: object) -> Any:
    return json.loads(call(*words, "--json").stdout)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "log"
    call("format", path, "--size", "256K", "--record", "32K", "--console", "32K", "--pmsg", "32K")
    return path


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample"
    path.write_bytes(lzma.decompress((SAMPLES / "k61_ecc0/region.bin.xz").read_bytes()))
    return path


def test_format_makes_the_region_that_was_asked_for(tmp_path: Path) -> None:
    options = ("--size=1M", "--record=128K", "--console=128K", "--pmsg=128K", "--ftrace=128K")
    made = ask("format", tmp_path / "log", *options, "--ecc=16", "--cpus=2", "--order=6.1")
    assert made == {
        "size": 1 << 20,
        "record": 1 << 17,
        "console": 1 << 17,
        "pmsg": 1 << 17,
        "ftrace": 1 << 17,
        "ecc": 16,
        "cpus": 2,
        "order": "6.1",
        "records": 5,
    }
    facts = ask("info", tmp_path / "log")
    assert made.items() <= facts.items()
    assert facts["kernel"].startswith("mem_size=0x100000 record_size=0x20000")
    assert [zone["state"] for zone in facts["zones"]] == ["valid"] * 9


def test_format_refuses_a_file_with_something_in_it(file: Path) -> None:
    assert "force" in call("format", file, status=1).stderr
    call("format", file, "--force")


def test_format_refuses_absurd_geometry(tmp_path: Path) -> None:
    result = call("format", tmp_path / "log", "--size", "64K", "--record", "1M", status=2)
    assert "no room" in result.stderr
    assert not (tmp_path / "log").exists()


def test_ls_and_show_tell_what_the_kernel_would(sample: Path) -> None:
    files = load_sample(SAMPLES / "k61_ecc0").files
    del files["ftrace-ramoops-0"]
    listed = {fact["name"]: fact["size"] for fact in ask("ls", sample)}
    assert listed.pop("ftrace-ramoops-0")
    assert listed == {name: len(data) for name, data in files.items()}
    for name, data in files.items():
        assert call("show", sample, name).stdout_bytes == data
        assert ask("show", sample, name)["text"] == data.decode()
    assert "==> console-ramoops-0 <==" in call("show", sample).stdout


def test_extract_writes_the_files_with_their_times(sample: Path, tmp_path: Path) -> None:
    names = ask("extract", sample, tmp_path / "out")
    files = load_sample(SAMPLES / "k61_ecc0").files
    del files["ftrace-ramoops-0"]
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(found.pop("ftrace-ramoops-0")) > 100000
    assert found == files
    assert len(names) == 6
    record = tmp_path / "out/dmesg-ramoops-0"
    assert record.stat().st_mtime_ns == 1795423308788279000
    assert record.stat().st_mode & 0o777 == 0o444
    call("extract", sample, tmp_path / "out")


def test_kallsyms_names_the_calls(sample: Path, tmp_path: Path) -> None:
    (tmp_path / "kallsyms").write_text("ffffffff81000000 T _text\nffffffffff000000 T _end\n")
    shown = call("show", sample, "ftrace-ramoops-0", "--kallsyms", tmp_path / "kallsyms").stdout
    assert "  _text <- _text+0x" in shown.splitlines()[0]
    (tmp_path / "kallsyms").write_text("nonsense")
    assert "kallsyms" in call("show", sample, "--kallsyms", tmp_path / "kallsyms", status=2).stderr


def test_show_marks_records_as_read_and_peek_does_not(file: Path) -> None:
    with Recorder(file, watch=False) as recorder:
        recorder.dmesg("Oops", "text\n")
    call("show", file, "--peek")
    assert ask("ls", file)[0]["read"] == "no"
    call("show", file)
    assert ask("ls", file)[0]["read"] == "yes"
    assert ask("info", file)["unread"] == 0


def test_looking_at_a_region_of_a_kernel_changes_no_byte_of_it(
    sample: Path, tmp_path: Path
) -> None:
    before = sample.read_bytes()
    call("show", sample)
    call("ls", sample)
    call("info", sample)
    call("extract", sample, tmp_path / "out")
    call("export", sample, tmp_path / "copy")
    assert sample.read_bytes() == before
    assert {fact["read"] for fact in ask("ls", sample)} == {"no", ""}


def test_erase_removes_what_is_named_or_all(file: Path) -> None:
    call("log", file, text=b"one\n")
    call("log", file, "--to", "console", text=b"two\n")
    assert ask("erase", file, "pmsg-ramoops-0") == {"erased": ["pmsg-ramoops-0"]}
    assert [fact["name"] for fact in ask("ls", file)] == ["console-ramoops-0"]
    call("erase", file, "--all")
    assert ask("ls", file) == []
    assert "it shows no file" in call("erase", file, "console-ramoops-0", status=1).stderr
    assert "--all" in call("erase", file, status=2).stderr


def test_log_records_the_standard_input(file: Path) -> None:
    assert json.loads(call("log", file, "--json", text=b"a\nb\n").stdout) == {"lines": 2}
    call("log", file, "--to", "console", text=b"c\n")
    assert call("show", file, "pmsg-ramoops-0").stdout == "a\nb\n"
    assert call("show", file, "console-ramoops-0").stdout == "c\n"


def test_import_and_export_copy_a_region_whole(sample: Path, tmp_path: Path) -> None:
    call("import", sample, tmp_path / "in")
    assert (tmp_path / "in").read_bytes() == sample.read_bytes()
    assert "force" in call("import", sample, tmp_path / "in", status=1).stderr
    call("export", tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == sample.read_bytes()
    assert "itself" in call("export", tmp_path / "in", tmp_path / "in", status=2).stderr


def test_a_directory_is_no_place_for_a_region(file: Path, tmp_path: Path) -> None:
    for arguments in (
        ("format", tmp_path),
        ("export", file, tmp_path, "--force"),
        ("ls", tmp_path),
    ):
        assert "is not a regular file" in call(*arguments, status=2).stderr


def test_policy_is_set_and_told(file: Path) -> None:
    assert ask("info", file)["policy"] == "keep"
    assert ask("policy", file, "overwrite") == {"policy": "overwrite"}
    assert ask("info", file)["policy"] == "overwrite"


def test_what_is_no_region_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(100000))
    for words in (("ls",), ("show",), ("info",), ("erase", "--all"), ("log",)):
        result = call(words[0], tmp_path / "file", *words[1:], status=3)
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("vfsmap: no ramoops region found")
    assert "No such file" in call("ls", tmp_path / "nothing", status=1).stderr


def test_geometry_that_was_given_is_used(sample: Path) -> None:
    options = ("--record=128K", "--console=128K", "--pmsg=128K", "--ftrace=128K", "--cpus=2")
    assert len(ask("ls", sample, *options, "--order", "6.1")) == 6
    assert len(ask("ls", sample, *options, "--order", "6.12")) == 4
    assert "cut off" in call("ls", sample, "--size", "2M", status=2).stderr


def test_what_an_option_tells_goes_before_what_is_detected(sample: Path) -> None:
    found = ask("info", sample)
    told = ask("info", sample, "--ecc", "16")
    assert (found["ecc"], told["ecc"]) == (0, 16)
    assert {key: told[key] for key in ("console", "ftrace", "cpus", "order")} == {
        "console": 128 << 10,
        "ftrace": 128 << 10,
        "cpus": 2,
        "order": "6.1",
    }


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_log_and_follow_end_well_when_they_are_told_to(file: Path, ending: signal.Signals) -> None:
    words = [*PSTORE, "show", str(file), "--follow", "--json"]
    follower = subprocess.Popen(words, stdout=subprocess.PIPE)
    words = [*PSTORE, "log", str(file), "--to", "console", "--json"]
    logger = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert logger.stdin
    assert logger.stdout
    assert follower.stdout
    logger.stdin.write(b"a line\n")
    logger.stdin.flush()
    assert json.loads(follower.stdout.readline()) == {"text": "a line\n"}
    for process in (logger, follower):
        process.send_signal(ending)
        assert process.wait(60) == 0
    assert json.loads(logger.stdout.read()) == {"lines": 1}
    assert follower.stdout.read() == b""
    for stream in (logger.stdin, logger.stdout, follower.stdout):
        stream.close()


def run(file: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    words = [*RUN, str(file), "--", *command]
    return subprocess.run(words, capture_output=True, check=False)


def records(file: Path) -> list[str]:
    with Region.open(file) as region:
        return [shown.data.decode() for shown in region.files() if shown.kind == "dmesg"]


def test_run_passes_output_and_success_on_and_records_the_output(file: Path) -> None:
    done = run(file, "sh", "-c", "echo out; echo err >&2; printf last")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"out\nlast", b"err\n")
    with Region.open(file) as region:
        shown = region.file("console-ramoops-0").data
    assert sorted(shown.splitlines()) == [b"err", b"last", b"out"]
    assert records(file) == []


def test_run_of_a_command_that_fails_leaves_its_exit_status(file: Path) -> None:
    done = run(file, "sh", "-c", "echo it broke; exit 3")
    assert (done.returncode, done.stdout) == (3, b"it broke\n")
    (record,) = records(file)
    assert record.startswith("Oops#1 Part1\nit broke\nsh -c ")
    assert record.endswith(": exit status 3\n")


def test_run_of_a_command_that_is_killed_leaves_its_signal_and_dies_of_it(file: Path) -> None:
    done = run(file, "sh", "-c", "echo bye; kill -SEGV $$")
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, b"bye\n")
    (record,) = records(file)
    assert record.startswith("Panic#1 Part1\nbye\n")
    assert record.endswith(": killed by signal 11 (SIGSEGV)\n")


def test_run_does_not_wait_for_what_the_command_left_running(file: Path) -> None:
    done = subprocess.Popen(
        [*RUN, str(file), "--", "sh", "-c", "sleep 300 & echo $!"],
        stdout=subprocess.PIPE,
    )
    assert done.stdout
    child = int(done.stdout.readline())
    try:
        assert done.wait(60) == 0
    finally:
        os.kill(child, signal.SIGKILL)
        done.stdout.close()


def test_run_hands_sigterm_on(file: Path) -> None:
    words = [*RUN, str(file), "--"]
    script = "import time; print('up', flush=True); time.sleep(300)"
    done = subprocess.Popen([*words, sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert done.stdout
    assert done.stdout.readline() == b"up\n"
    done.terminate()
    assert done.wait(60) == -signal.SIGTERM
    done.stdout.close()
    assert records(file)[0].endswith("(SIGTERM)\n")


HELD_BACK = """
import runpy, signal, sys, threading
# another thread takes the signal, so it interrupts no wait of this one
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
runpy.run_module("vfsmap_tools.pstore", run_name="__main__")
"""
UNTIL_TERMINATED = """
import signal, time
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
print("up", flush=True)
time.sleep(300)
"""


def test_run_hands_a_signal_on_that_interrupts_no_wait(file: Path) -> None:
    words = [sys.executable, "-c", HELD_BACK, "run", str(file), "--"]
    done = subprocess.Popen(
        [*words, sys.executable, "-c", UNTIL_TERMINATED], stdout=subprocess.PIPE
    )
    assert done.stdout
    assert done.stdout.readline() == b"up\n"
    done.terminate()
    try:
        assert done.wait(60) == -signal.SIGTERM
    finally:
        done.kill()
        done.wait()
        done.stdout.close()
    assert records(file)[0].endswith("(SIGTERM)\n")


def test_run_of_no_command_says_so_as_a_shell_does(file: Path) -> None:
    done = run(file, "/nowhere/command")
    assert done.returncode == 127
    assert b"/nowhere/command" in done.stderr


def test_line_that_is_being_written_is_shown_and_followed_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    path = tmp_path / "log"
    call("format", path, "--size=64K", "--record=8K", "--console=16K", "--pmsg=8K", "--ecc=16")
    line = b"a line that is long enough to take a while " * 8 + b"\n"
    writer = os.fork()
    if not writer:
        try:
            with Recorder(path, watch=False) as recorder:
                while True:
                    recorder.console(line)
        finally:
            os._exit(1)
    try:
        with Region.open(path, writable=True) as region:
            zone = region.zone("console")
            assert zone
            seen = grow(zone, lambda: settle(region))
            told = b""
            while len(told) < 20 * zone.capacity:
                told += next(seen)
                console = [file for file in region.files() if file.kind == "console"]
                assert all(file.corrected == file.bad == 0 for file in console)
    finally:
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)


def test_followed_zone_tells_what_was_added_also_around_the_end(file: Path) -> None:
    with Recorder(file, watch=False) as recorder, Region.open(file, writable=True) as region:
        zone = region.zone("console")
        assert zone
        recorder.console("before\n")
        seen = grow(zone, lambda: settle(region))
        told = next(seen) + next(seen)
        written = b"before\n"
        for n in range(900):
            line = f"line {n} {'-' * (n % 70)}\n".encode()
            recorder.console(line)
            written += line
            told += next(seen)
        assert told == written
        region_again = Region.open(file, writable=True)
        region_again.erase_all()
        region_again.close()
        recorder.console("after\n")
        assert next(seen) == b"after\n"

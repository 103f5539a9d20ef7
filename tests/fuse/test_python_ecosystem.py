"""Libraries that people use, on files of a mounted pool: by fsspec, and over windows."""

import io
import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.bag
import fsspec
import numpy
import pandas
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
import pytest
import safetensors
import safetensors.numpy
import zarr

import vfsmap
from vfsmap.fsspec import VfsmapFileSystem, WindowFile
from vfsmap.testing.commands import Server, served_pool
from vfsmap.testing.commands import vfsmap as command
from vfsmap.testing.media import tmpfs
from vfsmap.units import GIB, MIB, PMD


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with tmpfs(huge="always", size="600M") as place, served_pool(place, "512M") as served:
        yield served


@pytest.fixture
def here(server: Server, request: pytest.FixtureRequest) -> Path:
    return server.make_directory(request.node.name)


@pytest.fixture
def frame() -> Any:
    numbers = numpy.arange(50_000)
    return pandas.DataFrame({"number": numbers, "half": numbers / 2, "text": numbers.astype(str)})


def url(path: Path) -> str:
    return f"vfsmap://{path}"


def seal(path: Path) -> None:
    command("seal", path)


# fsspec itself


def test_the_protocol_is_registered() -> None:
    assert fsspec.get_filesystem_class("vfsmap") is VfsmapFileSystem


def test_reads_come_from_windows(here: Path) -> None:
    (here / "file").write_bytes(bytes(range(256)) * 100)
    with fsspec.open(url(here / "file")) as file:
        assert isinstance(file, WindowFile)
        leases = json.loads(command("leases", here, "--json").stdout)
        assert len(leases) == 1
        assert file.read(3) == b"\0\1\2"
        assert file.seek(-2, io.SEEK_END) == 25_598
        assert file.read() == b"\xfe\xff"
        assert file.read(10) == b""
        file.seek(254)
        target = bytearray(4)
        assert file.readinto(target) == 4
        assert target == b"\xfe\xff\0\1"
        with pytest.raises(ValueError, match="before the start"):
            file.seek(-1)
    assert file.closed
    with pytest.raises(ValueError, match="closed"):
        file.read()


@pytest.mark.parametrize(
    ("start", "end"), [(None, None), (10, 20), (-5, None), (None, -5), (20, 10), (90, 500)]
)
def test_cat_file_takes_limits_as_slices_do(
    server: Server, start: int | None, end: int | None
) -> None:
    path = server.directory / "limits"
    content = bytes(range(100))
    path.write_bytes(content)
    fs = fsspec.filesystem("vfsmap")
    assert fs.cat_file(str(path), start, end) == content[start:end]


def test_cat_ranges_maps_each_file_once_and_puts_errors_in_their_places(here: Path) -> None:
    for name in "ab":
        (here / name).write_bytes(name.encode() * 1000)
    fs = fsspec.filesystem("vfsmap")
    paths = [str(here / name) for name in ("a", "b", "missing", "a")]
    found = fs.cat_ranges(paths, [0, 10, 0, -3], [2, 14, 5, None])
    assert found[:2] == [b"aa", b"bbbb"]
    assert isinstance(found[2], FileNotFoundError)
    assert found[3] == b"aaa"
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 1, on_error="raise")
    assert fs.cat(paths[:2]) == {paths[0]: b"a" * 1000, paths[1]: b"b" * 1000}


def test_directories_are_listed_and_files_made_moved_and_removed(here: Path) -> None:
    fs = fsspec.filesystem("vfsmap")
    fs.makedirs(url(here / "x/y"))
    with fs.open(url(here / "x/y/file"), "wb") as file:
        file.write(b"12345")
    with fs.open(url(here / "x/y/file"), "a") as file:
        file.write("678\n")
    assert fs.info(url(here / "x/y/file"))["size"] == 9
    assert fs.ls(url(here / "x"), detail=False) == [str(here / "x/y")]
    assert fs.glob(url(here / "**/file")) == [str(here / "x/y/file")]
    assert fs.open(url(here / "x/y/file"), "rt").read() == "12345678\n"
    fs.mv(url(here / "x/y/file"), url(here / "moved"))
    assert fs.cat(url(here / "moved")) == b"12345678\n"
    fs.rm(url(here / "x"), recursive=True)
    assert not (here / "x").exists()


def test_errors_are_those_of_the_operating_system(here: Path) -> None:
    fs = fsspec.filesystem("vfsmap")
    with pytest.raises(FileNotFoundError):
        fs.open(url(here / "missing"))
    with pytest.raises(IsADirectoryError):
        fs.cat_file(url(here))
    (here / "sealed").write_bytes(b"content")
    seal(here / "sealed")
    with pytest.raises(PermissionError):
        fs.open(url(here / "sealed"), "wb")


def test_files_elsewhere_are_read_as_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with fsspec.open(url(tmp_path / "file")) as file:
        assert not isinstance(file, WindowFile)
        assert file.read() == b"content"


def test_an_empty_file_is_read(here: Path) -> None:
    (here / "empty").touch()
    assert fsspec.filesystem("vfsmap").cat_file(str(here / "empty")) == b""


def test_a_file_to_be_opened_is_sent_to_other_processes(here: Path) -> None:
    (here / "file").write_bytes(b"content")
    opened = pickle.loads(pickle.dumps(fsspec.open(url(here / "file"))))
    with opened as file:
        assert file.read() == b"content"


# pandas, pyarrow, dask, zarr


@pytest.mark.parametrize("sealed", [False, True], ids=["unsealed", "sealed"])
def test_pandas_and_pyarrow_read_a_parquet_file(here: Path, frame: Any, sealed: bool) -> None:
    path = here / "table.parquet"
    frame.to_parquet(url(path))
    if sealed:
        seal(path)
    assert pandas.read_parquet(url(path)).equals(frame)
    fs = fsspec.filesystem("vfsmap")
    table = pyarrow.parquet.read_table(str(path), filesystem=fs, columns=["half"])
    assert table.column("half").to_numpy().sum() == frame["half"].sum()
    dataset = pyarrow.dataset.dataset(str(here), filesystem=fs, format="parquet")
    assert dataset.count_rows(filter=pyarrow.dataset.field("number") < 100) == 100


def test_a_program_that_ends_while_arrow_lets_go_of_a_file_ends_well(
    here: Path, frame: Any
) -> None:
    """Arrow's own threads collect its files, perhaps while the interpreter is going away."""
    frame.to_parquet(url(here / "a.parquet"))
    program = (
        "import fsspec, pyarrow.dataset as d; fs = fsspec.filesystem('vfsmap');"
        f"print(d.dataset({str(here)!r}, filesystem=fs, format='parquet')"
        ".count_rows(filter=d.field('number') < 10))"
    )
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "10\n", "")


def test_pandas_writes_and_reads_text(here: Path, frame: Any) -> None:
    frame.to_csv(url(here / "table.csv"), index=False)
    found = pandas.read_csv(url(here / "table.csv"), dtype={"text": frame["text"].dtype})
    assert found.equals(frame)


def test_dask_reads_many_files(here: Path) -> None:
    for number in range(8):
        (here / f"part-{number}.txt").write_text(f"{number}\n" * 100)
    with dask.config.set(scheduler="threads"):
        lines = dask.bag.read_text(url(here / "part-*.txt")).map(int)
        assert lines.sum().compute() == 2800


def test_zarr_keeps_an_array(here: Path) -> None:
    array = numpy.arange(1_000_000).reshape(1000, 1000)
    zarr.save_array(url(here / "array.zarr"), array)
    found = zarr.open_array(url(here / "array.zarr"), mode="r")
    assert (found[100:200, 5:10] == array[100:200, 5:10]).all()


# over windows, with no copy


def lies_in(array: Any, window: vfsmap.Window) -> bool:
    start, length = window.address, window.length
    return bool(start <= array.ctypes.data and array.ctypes.data + array.nbytes <= start + length)


def test_an_arrow_file_is_read_in_place(here: Path, frame: Any) -> None:
    table = pyarrow.Table.from_pandas(frame[["number", "half"]])
    with pyarrow.ipc.new_file(str(here / "table.arrow"), table.schema) as writer:
        writer.write_table(table)
    with vfsmap.map(here / "table.arrow", direct=True) as window:
        before = pyarrow.total_allocated_bytes()
        found = pyarrow.ipc.open_file(pyarrow.py_buffer(window.view())).read_all()
        numbers = found.column("number").chunk(0).to_numpy()
        assert pyarrow.total_allocated_bytes() == before
        assert lies_in(numbers, window)
        assert numbers.sum() == frame["number"].sum()
        del numbers, found


def test_safetensors_are_read_in_place(here: Path) -> None:
    path = here / "model.safetensors"
    weights = numpy.random.default_rng(1).random((512, 512), dtype=numpy.float32)
    safetensors.numpy.save_file({"weights": weights, "bias": weights[0]}, path)
    with vfsmap.map(path, direct=True) as window:
        tensors = dict(safetensors_in(window))
        assert (tensors["weights"] == weights).all()
        assert lies_in(tensors["weights"], window)
        assert not tensors["weights"].flags.writeable
        del tensors


def safetensors_in(window: vfsmap.Window) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a safetensors file, as docs/howto/python.md has it."""
    view = window.view()
    length = int.from_bytes(view[:8], "little")
    kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
    for name, entry in json.loads(bytes(view[8 : 8 + length])).items():
        if name != "__metadata__":
            first, last = (8 + length + at for at in entry["data_offsets"])
            array = numpy.frombuffer(view[first:last], kinds[entry["dtype"]])
            yield name, array.reshape(entry["shape"])


def test_torch_takes_a_window(here: Path) -> None:
    torch = pytest.importorskip("torch")  # too large to be a dependency of tests
    (here / "weights").write_bytes(numpy.arange(1000, dtype="float32").tobytes())
    with vfsmap.map(here / "weights", private=True) as window:
        tensor = torch.frombuffer(window.view(), dtype=torch.float32)
        assert tensor.data_ptr() == window.address
        assert float(tensor.sum()) == 499_500
        del tensor


READER = """
import sys, vfsmap
from pathlib import Path
with vfsmap.map(sys.argv[1], direct=True, level=vfsmap.PMD, populate=True) as window:
    array = window.array("float64")
    total = float(array.sum())
    pss = rss = huge = 0
    start, end = window.address, window.address + window.length
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            first, last = (int(part, 16) for part in name.split("-"))
            inside = start <= first and last <= end
        elif inside:
            pss += int(values[0]) * 1024 if name == "Pss:" else 0
            rss += int(values[0]) * 1024 if name == "Rss:" else 0
            huge += int(values[0]) * 1024 if name == "ShmemPmdMapped:" else 0
    print(total, pss, rss, huge, flush=True)
    sys.stdin.readline()
    del array
"""


@pytest.mark.parametrize("size", [64 * MIB, pytest.param(GIB, marks=pytest.mark.slow)])
def test_two_processes_share_one_copy_of_an_array_at_huge_entries(size: int) -> None:
    with (
        tmpfs(huge="always", size=size + 128 * MIB) as place,
        served_pool(place, str(size + 64 * MIB)) as served,
    ):
        path = served.directory / "array"
        with path.open("wb") as file:
            for piece in range(size // (16 * MIB)):
                file.write(numpy.full(2 * MIB, float(piece)).tobytes())
        total = sum(float(piece) * 2 * MIB for piece in range(size // (16 * MIB)))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", READER, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(2)
        ]
        try:
            lines = [process.stdout.readline() for process in processes if process.stdout]
            again = vfsmap.map(path, direct=True, level=PMD, populate=True)
            backed = served.pool.stat().st_blocks * 512
        finally:
            for process in processes:
                process.communicate("\n")
        with again:
            pass
        found = [[float(word) for word in line.split()] for line in lines]
        assert [process.returncode for process in processes] == [0, 0]
        for sum_, pss, rss, huge in found:
            assert sum_ == total
            assert rss == huge == size  # all of it, by entries of 2 MiB
            assert pss <= size
        # whoever looked last shared with the other, and with the server
        assert min(pss for _, pss, _, _ in found) <= size / 2
        assert backed < size + 64 * MIB + MIB  # and the medium holds it once

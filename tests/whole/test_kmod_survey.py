"""Counted over whole packages: the numbers that were measured once, exactly."""

import json
from pathlib import Path

import pytest

from vfsmap.testing.commands import vfsmap
from vfsmap.testing.kernels import kernel, modules

COUNTS = {
    "61": {
        "modules": 1121,
        "text_bytes": 16913166,
        "init_text_bytes": 134504,
        "text_pages": 4850,
        "modules_of_one_page": 698,
        "modules_of_16_pages": 1075,
        "tail_static_calls": 43,
        "relocated_pages": 4806,
        "patched_pages": 4641,
        "touched_pages": 4806,
        "untouched_modules": 0,
        "median_text_bytes": 2182,
    },
    "612": {
        "modules": 1138,
        "text_bytes": 20019986,
        "init_text_bytes": 198103,
        "text_pages": 5604,
        "modules_of_one_page": 684,
        "modules_of_16_pages": 1085,
        "tail_static_calls": 41,
        "relocated_pages": 5567,
        "patched_pages": 5535,
        "touched_pages": 5572,
        "untouched_modules": 0,
        "median_text_bytes": 2359,
    },
}
RELOCATIONS = {
    "61": {"total": 562985, "PLT32": 361683, "PC32": 90311, "32S": 110938, "64": 7, "NONE": 46},
    "612": {"total": 599410, "PLT32": 416141, "PC32": 70988, "32S": 112269, "64": 12},
}
KINDS = {
    "61": {
        ".altinstructions": (659, 188),
        ".parainstructions": (486, 111),
        ".retpoline_sites": (8917, 1869),
        ".return_sites": (53802, 4522),
        ".smp_locks": (12049, 2253),
        "__jump_table": (11527, 2003),
        ".static_call_sites": (7143, 1273),
        "__mcount_loc": (47047, 4266),
        ".orc_unwind_ip": (493122, 0),
        "__bug_table": (9419, 0),
        "__ex_table": (730, 0),
    },
    "612": {
        ".altinstructions": (1591, 271),
        ".retpoline_sites": (9717, 2142),
        ".return_sites": (62580, 5332),
        ".call_sites": (357893, 5489),
        ".ibt_endbr_seal": (12954, 2329),
        ".smp_locks": (13384, 2634),
        "__jump_table": (11593, 2241),
        ".static_call_sites": (8338, 1541),
        "__mcount_loc": (54375, 5110),
        ".orc_unwind_ip": (551961, 0),
        "__bug_table": (10868, 0),
        "__ex_table": (755, 0),
    },
}


@pytest.mark.parametrize("key", ["61", "612"])
def test_a_package_counts_as_was_measured(key: str) -> None:
    found = json.loads(vfsmap("module", "sites", "--all", kernel(key), "--json").stdout)
    assert {name: found[name] for name in COUNTS[key]} == COUNTS[key]
    assert found["relocations"] == RELOCATIONS[key]
    kinds = {name: (kind["sites"], kind["pages"]) for name, kind in found["kinds"].items()}
    assert kinds == KINDS[key]
    assert found["tiers"]["T0"] == COUNTS[key]["relocated_pages"]
    assert found["tiers"]["T4"] == 0
    largest = {"61": ("btrfs", 1011043), "612": ("bcachefs", 1203260)}[key]
    assert (found["largest"]["module"], found["largest"]["text_bytes"]) == largest


# modules, bytes and pages of text, pages relocated, patched and touched
LARGE = {
    "61-amd64": (4023, 68608991, 436316, 19146, 19094, 18197, 19095),
    "612-amd64": (4230, 81501241, 607699, 22400, 22352, 22088, 22364),
}
LARGE_KINDS = {
    "61-amd64": {
        ".altinstructions": (1657, 626),
        ".parainstructions": (3007, 345),
        ".retpoline_sites": (75545, 8355),
        ".return_sites": (216674, 17645),
        ".smp_locks": (34247, 6788),
        "__jump_table": (39928, 6420),
        ".static_call_sites": (15906, 3178),
        "__mcount_loc": (192583, 16830),
        ".orc_unwind_ip": (1985066, 0),
        "__bug_table": (26767, 0),
        "__ex_table": (739, 0),
    },
    "612-amd64": {
        ".altinstructions": (5938, 989),
        ".retpoline_sites": (93377, 9835),
        ".return_sites": (248607, 20975),
        ".call_sites": (1458002, 22006),
        ".ibt_endbr_seal": (52217, 9156),
        ".smp_locks": (37189, 7591),
        "__jump_table": (42190, 7347),
        ".static_call_sites": (18812, 3742),
        "__mcount_loc": (217530, 20323),
        ".orc_unwind_ip": (2204838, 0),
        "__bug_table": (33444, 0),
        "__ex_table": (783, 0),
    },
}
SHARES = {
    "61-amd64": (99.7, 98.0, 97.5, 60.4, 0, 38.9),
    "612-amd64": (99.8, 98.0, 97.3, 58.2, 0, 38.3),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["61-amd64", "612-amd64"])
def test_a_large_package_counts_as_was_measured(key: str) -> None:
    found = json.loads(vfsmap("module", "sites", "--all", kernel(key), "--json").stdout)
    pages = found["text_pages"]
    counts = [found[name] for name in ("modules", "text_bytes", "init_text_bytes")]
    counts += [pages, *(found[f"{name}_pages"] for name in ("relocated", "patched", "touched"))]
    assert tuple(counts) == LARGE[key]
    kinds = {name: (kind["sites"], kind["pages"]) for name, kind in found["kinds"].items()}
    assert kinds == LARGE_KINDS[key]
    shares = [*found["tiers"].values(), found["toggled_pages"]]
    assert tuple(round(100 * share / pages, 1) for share in shares) == SHARES[key]


def test_one_module_is_shown_as_a_table() -> None:
    shown = vfsmap("module", "sites", modules("61")["xfs"]).stdout
    assert "799969 bytes of text in 196 pages" in shown
    assert ".return_sites" in shown
    assert "T4" in shown


def test_files_of_a_package_that_are_no_modules_are_named(tmp_path: Path) -> None:
    (tmp_path / "good.ko").write_bytes(modules("61")["crc7"].read_bytes())
    (tmp_path / "bad.ko").write_bytes(b"nothing")
    done = vfsmap("module", "sites", "--all", tmp_path, "--json")
    assert json.loads(done.stdout)["modules"] == 1
    assert "bad.ko is not an ELF file" in done.stderr

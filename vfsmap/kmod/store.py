"""The image store: a directory of modules bound to hosts, several variants of each side by side.

``index.json`` tells what there is; it is replaced whole, and names nothing that is not there yet.
``packs`` holds the bound images, ``sources`` the modules as they were, ``hosts`` the documents.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from vfsmap.errors import Damaged, Exists, Invalid, NotFound
from vfsmap.kmod.bind import Bound, Placed, bases_from, bind, place_for
from vfsmap.kmod.host import MODULE_AREA, Host
from vfsmap.kmod.layout import Area, Layout
from vfsmap.kmod.module import Module
from vfsmap.kmod.pack import (
    DATA,
    FILES,
    IN_PLACE,
    TEXT,
    PackFile,
    arrange,
    damaged_blocks,
    data_parts,
    in_units,
    write_file,
)
from vfsmap.kmod.relocate import PLT32, Resolver
from vfsmap.kmod.userspace import (
    FIRST_SLOT,
    FIRST_VARIABLE,
    IMAGES,
    IMAGES_END,
    SLOT,
    SLOTS_MAX,
    STUBS,
    VARIABLE,
    VARIABLES,
    VARIABLES_MAX,
)
from vfsmap.units import PMD, PTE, align_up

_INDEX: Final = "index.json"
_MODULES_END: Final = 0xFFFF_FFFF_FF00_0000


class Variant(msgspec.Struct, frozen=True):
    """One module bound to one host."""

    name: str
    build_id: str
    source: str
    """sha256 of the unpacked module file."""
    host: str
    """Digest of the host's document."""
    profile: str
    """Digest of the CPU features and mitigations it was patched for."""
    symbols: str
    """Digest of what its imports were bound to."""
    pack: str
    bases: dict[str, int]
    sizes: dict[str, int]
    offsets: dict[str, int]
    """Where each copied area lies in the pack's data file."""
    thunk_pages: list[int] = []

    @property
    def text(self) -> range:
        """The addresses of its text."""
        start = self.bases[Area.TEXT.value]
        return range(start, start + self.sizes[Area.TEXT.value])

    @property
    def areas(self) -> dict[Area, int]:
        """Where its areas lie."""
        return {Area(name): base for name, base in self.bases.items()}


class Pack(msgspec.Struct, frozen=True):
    """Modules that were bound together."""

    files: dict[str, PackFile]
    modules: list[str]


class Index(msgspec.Struct):
    """What a store holds."""

    version: int = 1
    packs: dict[str, Pack] = {}
    variants: list[Variant] = []
    functions: list[str] = []
    """Imports that got a stub, in the order of their slots."""
    variables: list[str] = []


class Stubs(NamedTuple):
    """Places of stand-ins for what modules import, in user space."""

    functions: list[tuple[str, int]]
    variables: list[tuple[str, int]]


class Store:
    """A directory of bound images."""

    def __init__(self, directory: Path) -> None:
        """Open the store in a directory; an empty or missing one is an empty store.

        Raises:
            Damaged: its index makes no sense.
        """
        self.directory = directory
        self.index = self._read_index()

    def _read_index(self) -> Index:
        path = self.directory / _INDEX
        try:
            index = msgspec.json.decode(path.read_bytes(), type=Index)
        except FileNotFoundError:
            return Index()
        except NotADirectoryError:
            raise Invalid(f"{self.directory} is no directory") from None
        except msgspec.DecodeError as exc:
            raise Damaged(f"{path}: {exc}") from exc
        if index.version != 1:
            raise Damaged(f"{path} has the version {index.version}, 1 is known")
        return index

    def find(self, name: str, host: Host | None = None) -> list[Variant]:
        """Return a module's variants, those nearest to ``host`` first.

        Raises:
            NotFound: the store has no such module.
        """
        name = name.replace("-", "_")
        found = [variant for variant in self.index.variants if variant.name == name]
        if not found:
            known = ", ".join(sorted({v.name for v in self.index.variants})[:10]) or "nothing"
            raise NotFound(f"{self.directory} holds no module {name}, but {known}")
        if host is not None:
            digest = host_digest(host)
            found.sort(key=lambda v: (v.host != digest, v.profile != host.profile))
        return found

    def file(self, pack: str, name: str) -> Path:
        """Return where one of a pack's files is."""
        return self.directory / "packs" / pack / f"{name}.img"

    def source(self, variant: Variant) -> Module:
        """Return a variant's module as it was before it was bound.

        Raises:
            Damaged: it has changed, or is gone.
        """
        path = self.directory / "sources" / f"{variant.source}.ko"
        try:
            raw = path.read_bytes()
        except OSError as exc:
            raise Damaged(f"{path}: {exc.strerror}") from exc
        if hashlib.sha256(raw).hexdigest() != variant.source:
            raise Damaged(f"{path} has changed since {variant.name} was added")
        return Module(raw, f"{variant.name}.ko")

    def host(self, variant: Variant) -> Host:
        """Return the host that a variant was bound to."""
        return Host.open(self.directory / "hosts" / f"{variant.host}.json")

    def placed(self, variant: Variant, host: Host | None = None) -> Placed:
        """Return a variant's module where it was bound, relocated for its host or for another."""
        where = self.host(variant) if host is None else host
        return place_for(self.source(variant), where, variant.areas, self.resolver(variant, where))

    def bound(self, variant: Variant, host: Host) -> Bound:
        """Return a variant's module bound anew to a host, where it was bound before."""
        return bind(
            self.source(variant),
            host,
            variant.areas,
            resolve=self.resolver(variant, host),
            thunk_pages=variant.thunk_pages,
        )

    def resolver(self, variant: Variant, host: Host) -> Resolver:
        """Return what supplies symbols that the host's document does not have."""
        return _Linker(self, host, self.source(variant), []).resolve

    def stubs(self) -> Stubs:
        """Return all places of stand-ins."""
        return Stubs(
            [(n, STUBS + SLOT * (FIRST_SLOT + i)) for i, n in enumerate(self.index.functions)],
            [
                (n, VARIABLES + VARIABLE * (FIRST_VARIABLE + i))
                for i, n in enumerate(self.index.variables)
            ],
        )

    def add(self, modules: Sequence[Module], host: Host, at: int | None = None) -> list[Variant]:
        """Bind modules to a host and keep them, as one pack; return the new variants.

        Modules that the host's document places are bound there, others side by side at ``at`` or
        in the first free unit; either all of them, or none.

        Raises:
            Exists: a module is there already, bound to this host.
            NotFound: an import is not known.
            Invalid, Damaged, Unsupported: a module can't be bound so.

        Crash: all of the modules are there, or none.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.index = self._read_index()
            digest = host_digest(host)
            for module in modules:
                for variant in self.index.variants:
                    if (variant.build_id, variant.host) == (module.build_id, digest):
                        raise Exists(
                            f"{self.directory} holds {module.name} bound to that host already"
                        )
            bound = self._bind(modules, host, at)
            variants = self._write(bound, host, digest)
            self._replace_index()
        return variants

    def _bind(self, modules: Sequence[Module], host: Host, at: int | None) -> list[Bound]:
        layouts = [Layout(module) for module in modules]
        if at is None and all(module.name in host.modules for module in modules):
            places = [bases_from(host, m, lay) for m, lay in zip(modules, layouts, strict=True)]
        else:
            start = self._free_unit(host) if at is None else at
            places = arrange(layouts, start)
            limit = IMAGES_END if host.user_space else _MODULES_END
            end = max(
                (
                    b + layout.sizes[a]
                    for layout, place in zip(layouts, places, strict=True)
                    for a, b in place.items()
                ),
                default=0,
            )
            if end > limit:
                raise Invalid(
                    f"modules from {start:#x} on would end at {end:#x}, behind the "
                    f"addresses that they can be reached at"
                )
        bound: list[Bound] = []
        for module, place in zip(_in_order(modules), _reordered(modules, places), strict=True):
            linker = _Linker(self, host, module, [b.placed for b in bound])
            bound.append(bind(module, host, place, resolve=linker.resolve))
        return bound

    def _free_unit(self, host: Host) -> int:
        """Return the first unit of 2 MiB behind everything this host has."""
        digest = host_digest(host)
        end = IMAGES if host.user_space else MODULE_AREA
        for resident in host.modules.values():
            end = max(end, *resident.sections.values(), resident.text.stop)
        for variant in self.index.variants:
            if variant.host == digest or host.user_space:
                for area, base in variant.bases.items():
                    if area != Area.PERCPU.value:
                        end = max(end, base + variant.sizes[area])
        return align_up(end, PMD.size)

    def _write(self, bound: list[Bound], host: Host, digest: str) -> list[Variant]:
        """Write a pack and everything its variants need; the index does not name it yet."""
        names = [b.placed.module.name for b in bound]
        pack = hashlib.blake2b(
            repr(
                (
                    digest,
                    [
                        (
                            b.placed.module.build_id,
                            sorted(b.placed.bases.items(), key=lambda item: item[0].value),
                        )
                        for b in bound
                    ],
                )
            ).encode(),
            digest_size=8,
        ).hexdigest()
        directory = self.directory / "packs" / pack
        _make_empty(directory)
        content: dict[str, tuple[int, bytearray]] = {}
        for area, name in IN_PLACE.items():
            parts = [(b.placed.bases.get(area, 0), b.placed.area(area)) for b in bound]
            parts += [
                (page.start, bytes(page.data))
                for b in bound
                for page in b.thunk_pages
                if name == TEXT
            ]
            content[name] = in_units(parts, name)
        offsets: list[dict[str, int]] = []
        data = bytearray()
        for one in bound:
            offsets.append({})
            for area, raw in data_parts(one).items():
                offsets[-1][area.value] = len(data)
                data += raw.ljust(align_up(len(raw), PTE.size), b"\0")
        content[DATA] = 0, data
        files = {
            name: write_file(self.file(pack, name), raw, address)
            for name, (address, raw) in content.items()
        }
        variants = [
            self._keep(one, host, digest, pack, where)
            for one, where in zip(bound, offsets, strict=True)
        ]
        _write_once(self.directory / "hosts" / f"{digest}.json", host.encode())
        self.index.packs[pack] = Pack(files, names)
        self.index.variants += variants
        return variants

    def _keep(
        self, bound: Bound, host: Host, digest: str, pack: str, offsets: dict[str, int]
    ) -> Variant:
        """Keep a module's source; return its variant."""
        placed = bound.placed
        raw = bytes(placed.module.elf.data)
        source = hashlib.sha256(raw).hexdigest()
        _write_once(self.directory / "sources" / f"{source}.ko", raw)
        return Variant(
            name=placed.module.name,
            build_id=placed.module.build_id,
            source=source,
            host=digest,
            profile=host.profile,
            symbols=symbols_digest(placed),
            pack=pack,
            bases={area.value: base for area, base in placed.bases.items()},
            sizes={area.value: size for area, size in placed.layout.sizes.items()},
            offsets=offsets,
            thunk_pages=[page.start for page in bound.thunk_pages],
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from adding at the same time."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _replace_index(self) -> None:
        path = self.directory / f"{_INDEX}.new"
        with path.open("wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(self.index), indent=1))
            stream.flush()
            os.fsync(stream.fileno())
        path.replace(self.directory / _INDEX)  # the commit point

    def verify(self) -> dict[str, list[int]]:
        """Check every file of every pack; return the damaged blocks of each that has some."""
        wrong = {}
        for pack, recorded in self.index.packs.items():
            for name in FILES:
                path = self.file(pack, name)
                try:
                    content = path.read_bytes()
                    found = damaged_blocks(path, recorded.files[name], memoryview(content))
                except OSError as exc:
                    raise Damaged(f"{path}: {exc.strerror}") from exc
                if len(content) != recorded.files[name].size:
                    found.append(min(len(content), recorded.files[name].size) // PTE.size)
                if found:
                    wrong[str(path.relative_to(self.directory))] = found
        return wrong


class _Linker:
    """Resolves what the host's document does not tell: other images, and stubs in user space."""

    def __init__(self, store: Store, host: Host, module: Module, others: list[Placed]) -> None:
        self._store = store
        self._host = host
        self._module = module
        self._others = others

    def resolve(self, name: str) -> int | None:
        for placed in self._others:
            if name in placed.module.exports:
                return placed.address_of_symbol(name)
        if not self._host.user_space:
            return None
        return self._from_store(name) or self._stub(name)

    def _from_store(self, name: str) -> int | None:
        for depended in self._module.depends:
            for variant in self._store.index.variants:
                if variant.name != depended.replace("-", "_"):
                    continue
                if not self._store.host(variant).user_space:
                    continue
                placed = self._store.placed(variant)
                if name in placed.module.exports:
                    return placed.address_of_symbol(name)
        return None

    def _stub(self, name: str) -> int:
        """Return the place of a stand-in, a new one if need be."""
        index = self._store.index
        is_function = name in index.functions or (
            name not in index.variables and self._is_called(name)
        )
        names = index.functions if is_function else index.variables
        if name not in names:
            names.append(name)
            if FIRST_SLOT + len(index.functions) > SLOTS_MAX or len(names) >= VARIABLES_MAX:
                raise Invalid(f"{self._store.directory}: there is no room for more imports")
        places = self._store.stubs()
        return dict(places.functions if is_function else places.variables)[name]

    def _is_called(self, name: str) -> bool:
        """Tell a function from a variable: something calls it."""
        elf = self._module.elf
        for section in elf.sections:
            for _, info, _ in elf.relocations(section) if section.is_loaded else ():
                if info & 0xFFFF_FFFF == PLT32 and elf.symbols[info >> 32].name == name:
                    return True
        return False


def host_digest(host: Host) -> str:
    """Return what tells one host's document from another."""
    return hashlib.blake2b(host.encode(), digest_size=16).hexdigest()


def symbols_digest(placed: Placed) -> str:
    """Return what tells one binding of a module's imports from another."""
    rows = zip(placed.module.elf.symbol_rows, placed.values, strict=True)
    imports = sorted((placed.module.elf.symbol_name(row), v) for row, v in rows if row[3] == 0)
    return hashlib.blake2b(repr(imports).encode(), digest_size=16).hexdigest()


def _in_order(modules: Sequence[Module]) -> list[Module]:
    """Return modules with those that others depend on first."""
    by_name = {module.name: module for module in modules}
    done: dict[str, Module] = {}

    def visit(module: Module, above: tuple[str, ...]) -> None:
        if module.name in done or module.name in above:
            return
        for name in module.depends:
            if (other := by_name.get(name.replace("-", "_"))) is not None:
                visit(other, (*above, module.name))
        done[module.name] = module

    for module in modules:
        visit(module, ())
    return list(done.values())


def _reordered(
    modules: Sequence[Module], places: Iterable[dict[Area, int]]
) -> list[dict[Area, int]]:
    """Return places in the order of :func:`_in_order`."""
    by_name = {module.name: place for module, place in zip(modules, places, strict=True)}
    return [by_name[module.name] for module in _in_order(modules)]


def _make_empty(directory: Path) -> None:
    """Make a directory, without what an add that was cut short has left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        path.unlink()


def _write_once(path: Path, content: bytes) -> None:
    """Write a file whose name fixes its content, unless it is there."""
    if path.exists() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)

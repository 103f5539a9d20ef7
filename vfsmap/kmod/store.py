"""The image store: a directory of modules bound to hosts, several variants of each side by side.

``index.json`` tells what there is; it is replaced whole, and names nothing that is not there yet.
``packs`` holds the bound images, ``sources`` the modules as they were, ``hosts`` the documents.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from vfsmap.errors import Damaged, Exists, Invalid, NotFound
from vfsmap.kmod.bind import (
    Bound,
    Placed,
    bind,
    place_for,
)
from vfsmap.kmod.host import Host, number
from vfsmap.kmod.index import Index, Pack, Variant, host_digest, symbols_digest
from vfsmap.kmod.kernel import Kernel, bind_kernel
from vfsmap.kmod.layout import Area
from vfsmap.kmod.linker import Linker, callers_at_hand, in_order
from vfsmap.kmod.module import Module
from vfsmap.kmod.pack import (
    DATA,
    FILES,
    IN_PLACE,
    TEXT,
    Mapper,
    damaged_blocks,
    data_parts,
    in_units,
    make_empty,
    write_file,
    write_once,
)
from vfsmap.kmod.placing import places_for
from vfsmap.kmod.subject import KernelSubject, ModuleSubject, Subject
from vfsmap.units import PTE, align_up

INDEX: Final = "index.json"


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
        path = self.directory / INDEX
        try:
            index = msgspec.json.decode(path.read_bytes(), type=Index)
        except FileNotFoundError:
            return Index()
        except NotADirectoryError:
            raise Invalid(f"{self.directory} is no directory") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            raise Damaged(f"{path}: {exc}") from exc
        if index.version != 1:
            raise Damaged(f"{path} has the version {index.version}, 1 is known")
        if wrong := index.problem():
            raise Damaged(f"{path}: {wrong}")
        return index

    def find(self, name: str, host: Host | None = None) -> list[Variant]:
        """Return a module's variants, those nearest to ``host`` first.

        ``NAME@ADDRESS`` names the variant whose text is bound to that address.

        Raises:
            NotFound: the store has no such module.
            Invalid: the address is none.
        """
        name, _, address = name.partition("@")
        name = name.replace("-", "_")
        if not name:
            raise Invalid("an image without a name: NAME or NAME@ADDRESS is expected")
        found = [variant for variant in self.index.variants if variant.name == name]
        if found and address:
            start = number(address)
            found = [variant for variant in found if variant.text.start == start]
            if not found:
                raise NotFound(f"{self.directory} holds no {name} bound to {start:#x}")
        if not found:
            known = ", ".join(sorted({v.name for v in self.index.variants})[:10]) or "nothing"
            raise NotFound(f"{self.directory} holds no module {name}, but {known}")
        if host is not None:
            digest = host_digest(host)
            found.sort(
                key=lambda v: (
                    v.host != digest,
                    v.kernel != host.release,
                    v.profile != host.profile,
                )
            )
        return found

    def names_of(self, pack: str) -> Callable[[int], str]:
        """Return what tells which of a pack's modules has an address in its text."""
        starts = sorted((v.text.start, v.name) for v in self.index.variants if v.pack == pack)
        return lambda address: starts[max(bisect_right(starts, (address + 1,)) - 1, 0)][1]

    def file(self, pack: str, name: str) -> Path:
        """Return where one of a pack's files is."""
        return self.directory / "packs" / pack / f"{name}.img"

    def _source(self, variant: Variant) -> bytes:
        """Return a variant's file as it was before it was bound.

        Raises:
            Damaged: it has changed, or is gone.
        """
        path = self.directory / "sources" / variant.source
        try:
            raw = path.read_bytes()
        except OSError as exc:
            raise Damaged(f"{path}: {exc.strerror}") from exc
        if hashlib.sha256(raw).hexdigest() != variant.source:
            raise Damaged(f"{path} has changed since {variant.name} was added")
        return raw

    def module(self, variant: Variant) -> Module:
        """Return a variant's module as it was before it was bound.

        Raises:
            Damaged: it has changed, or is gone.
            Invalid: it is a kernel.
        """
        if variant.is_kernel:
            raise Invalid(f"{variant.name} is a kernel, not a module")
        return Module(self._source(variant), f"{variant.name}.ko")

    def depends(self, variant: Variant) -> list[str]:
        """Return the modules that a variant needs."""
        return [] if variant.is_kernel else self.module(variant).depends

    def subject(self, variant: Variant) -> Subject:
        """Return what can be known of a variant, and bound to other hosts."""
        callers = partial(callers_at_hand, self)
        if variant.is_kernel:
            kernel = Kernel(self._source(variant), variant.name)
            return KernelSubject(kernel.moved_to(variant.text.start), callers)
        host = self.host(variant)
        return ModuleSubject(
            self.module(variant),
            host,
            variant.areas,
            self._linker(variant, host).resolve,
            variant.thunk_pages,
            callers,
        )

    def host(self, variant: Variant) -> Host:
        """Return the host that a variant was bound to.

        Raises:
            Damaged: its document has changed, or is gone.
        """
        path = self.directory / "hosts" / f"{variant.host}.json"
        try:
            host = Host.open(path)
        except OSError as exc:
            raise Damaged(f"{path}: {exc.strerror}") from exc
        if host_digest(host) != variant.host:
            raise Damaged(f"{path} has changed since {variant.name} was added")
        return host

    def placed(self, variant: Variant) -> Placed:
        """Return a variant's module where it was bound, relocated for its host."""
        host = self.host(variant)
        resolve = self._linker(variant, host).resolve
        return place_for(self.module(variant), host, variant.areas, resolve)

    def _linker(self, variant: Variant, host: Host) -> Linker:
        at = self.index.variants.index(variant)
        return Linker(self, host, self.module(variant), [], self.index.variants[:at])

    def add(
        self,
        modules: Sequence[Module],
        host: Host,
        at: int | None = None,
        beside: Sequence[Module] = (),
    ) -> list[Variant]:
        """Bind modules to a host and keep them, as one pack; return the new variants.

        Modules that the host's document places are bound there, others side by side at ``at`` or
        in the first free unit; either all of them, or none.  ``beside`` are modules that the host
        has, or had, loaded as well; those that the store has are known without.

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
            names = [module.name for module in modules]
            for name in names:
                if names.count(name) > 1:
                    raise Invalid(f"{name} is given twice")
            for module in modules if at is None else ():
                self._require_new(module.build_id, module.name, digest)
            bound = self._bind(modules, host, at, beside)
            variants = self._write(bound, host, digest)
            self._replace_index()
        return variants

    def add_kernel(
        self,
        raw: bytes,
        host: Host,
        beside: Sequence[Module] = (),
        *,
        file_name: str = "vmlinux",
    ) -> Variant:
        """Bind a kernel, given as its boot image, to a host and keep it.

        ``beside`` are modules that the host has, or had, loaded; those that the store has and the
        host has now are known without.

        Raises:
            Exists: it is there already, bound to this host, with nothing or the same in doubt.
            NotFound, Invalid, Damaged: it can't be bound so.

        Crash: it is there, or it is not; what it replaces may be left behind.
        """
        kernel = Kernel(raw, file_name)
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self.index = self._read_index()
            digest = host_digest(host)
            old = [
                v for v in self.index.variants if (v.build_id, v.host) == (kernel.build_id, digest)
            ]
            callers = callers_at_hand(self, host, beside)
            image, pages, doubts = bind_kernel(kernel, host, callers)
            if any(v.doubts in ([], doubts) for v in old):
                self._require_new(kernel.build_id, "vmlinux", digest)
            source = hashlib.sha256(raw).hexdigest()
            write_once(self.directory / "sources" / source, raw)
            text = image.memory.read(image.text.start, len(image.text))
            variant = Variant(
                name="vmlinux",
                build_id=kernel.build_id,
                kernel=host.release,
                source=source,
                host=digest,
                profile=host.profile,
                symbols="",
                pack=_pack_name([kernel.build_id, digest, *doubts]),
                bases={Area.TEXT.value: image.text.start},
                sizes=dict.fromkeys((area.value for area in Area), 0) | {"text": len(text)},
                offsets={},
                thunk_pages=[page.start for page in pages],
                is_kernel=True,
                doubts=doubts,
            )
            files = {TEXT: in_units([(image.text.start, text)], TEXT)}
            self._write_pack(variant.pack, files, [variant.name])
            write_once(self.directory / "hosts" / f"{digest}.json", host.encode())
            self.index.variants = [v for v in self.index.variants if v not in old] + [variant]
            for each in old:
                del self.index.packs[each.pack]
            self._replace_index()
            for each in old:
                shutil.rmtree(self.directory / "packs" / each.pack, ignore_errors=True)
        return variant

    def _require_new(self, build_id: str, name: str, host: str) -> None:
        for variant in self.index.variants:
            if (variant.build_id, variant.host) == (build_id, host):
                cure = ""
                if variant.doubts and not variant.is_kernel:  # a kernel is replaced
                    cure = "; to leave less in doubt, add it to a new store"
                raise Exists(f"{self.directory} holds {name} bound to that host already{cure}")

    def _write_pack(
        self, pack: str, content: dict[str, tuple[int, bytearray]], modules: list[str]
    ) -> None:
        """Write the files of a pack; the index on the medium does not name it yet."""
        make_empty(self.directory / "packs" / pack)
        files = {}
        for name in FILES:
            address, raw = content.get(name, (0, bytearray()))
            files[name] = write_file(self.file(pack, name), raw, address)
        self.index.packs[pack] = Pack(files, modules)

    def _bind(
        self, modules: Sequence[Module], host: Host, at: int | None, beside: Sequence[Module]
    ) -> list[Bound]:
        places = places_for(self, modules, host, at)
        bound: list[Bound] = []
        callers = callers_at_hand(self, host, beside, modules)
        place_of = {m.name: place for m, place in zip(modules, places, strict=True)}
        for module in in_order(modules):
            linker = Linker(self, host, module, [b.placed for b in bound], self.index.variants)
            bound.append(
                bind(
                    module,
                    host,
                    place_of[module.name].bases,
                    resolve=linker.resolve,
                    thunk_pages=place_of[module.name].thunk_pages,
                    callers=callers,
                )
            )
        return bound

    def _write(self, bound: list[Bound], host: Host, digest: str) -> list[Variant]:
        """Write a pack and everything its variants need; the index does not name it yet."""
        names = [b.placed.module.name for b in bound]
        pack = _pack_name(
            [digest, *(f"{b.placed.module.build_id}@{b.placed.image.text.start:x}" for b in bound)]
        )
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
        self._write_pack(pack, content, names)
        variants = [
            self._keep(one, host, digest, pack, where)
            for one, where in zip(bound, offsets, strict=True)
        ]
        write_once(self.directory / "hosts" / f"{digest}.json", host.encode())
        self.index.variants += variants
        return variants

    def _keep(
        self, bound: Bound, host: Host, digest: str, pack: str, offsets: dict[str, int]
    ) -> Variant:
        """Keep a module's source; return its variant."""
        placed = bound.placed
        raw = bytes(placed.module.elf.data)
        source = hashlib.sha256(raw).hexdigest()
        write_once(self.directory / "sources" / source, raw)
        return Variant(
            name=placed.module.name,
            build_id=placed.module.build_id,
            kernel=host.release,
            source=source,
            host=digest,
            profile=host.profile,
            symbols=symbols_digest(placed),
            pack=pack,
            bases={area.value: base for area, base in placed.bases.items()},
            sizes={area.value: size for area, size in placed.layout.sizes.items()},
            offsets=offsets,
            thunk_pages=[page.start for page in bound.thunk_pages],
            doubts=bound.doubts,
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
        path = self.directory / f"{INDEX}.new"
        with path.open("wb") as stream:
            stream.write(msgspec.json.format(msgspec.json.encode(self.index), indent=1))
            stream.flush()
            os.fsync(stream.fileno())
        path.replace(self.directory / INDEX)  # the commit point

    def verify(self, mapper: Mapper) -> dict[str, list[int]]:
        """Check every file of every pack; return the damaged blocks of each that has some.

        ``mapper`` maps files; ``vfsmap.map`` shows the medium itself, where caches can't hide it.

        Raises:
            Damaged: a file is gone, or its Merkle tree is damaged.
        """
        wrong = {}
        for pack, recorded in self.index.packs.items():
            for name in FILES:
                path = self.file(pack, name)
                try:
                    size = path.stat().st_size
                except OSError as exc:
                    raise Damaged(f"{path}: {exc.strerror}") from exc
                with mapper(path) as window, window.view() as view:
                    found = damaged_blocks(path, recorded.files[name], view)
                if size != recorded.files[name].size:
                    found.append(min(size, recorded.files[name].size) // PTE.size)
                if found:
                    wrong[str(path.relative_to(self.directory))] = found
        return wrong


def _pack_name(parts: list[str]) -> str:
    """Return a short name that follows from what a pack holds."""
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=8).hexdigest()

"""Linking: what the imports of a module are bound to beyond what the host's document tells."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from vfsmap.errors import Invalid, VfsmapError
from vfsmap.kmod.bind import Bound, Placed, bind, called_by
from vfsmap.kmod.branches import Callers, counts_calls
from vfsmap.kmod.host import Host
from vfsmap.kmod.index import Variant
from vfsmap.kmod.module import Module
from vfsmap.kmod.placing import bind_at
from vfsmap.kmod.relocate import PLT32
from vfsmap.kmod.userspace import FIRST_SLOT, SLOTS_MAX, VARIABLES_MAX

if TYPE_CHECKING:
    from vfsmap.kmod.store import Store


class Linker:
    """Resolves what the host's document does not tell: other images, and stubs in user space."""

    def __init__(
        self,
        store: "Store",
        host: Host,
        module: Module,
        others: list[Placed],
        earlier: Sequence[Variant],
    ) -> None:
        """Look among ``others``, then among the variants that the store has had ``earlier``.

        What came to the store later than a module was not there when that was bound.
        """
        self._store = store
        self._host = host
        self._module = module
        self._others = others
        self._earlier = earlier

    def resolve(self, name: str) -> int | None:
        """Return the address of an import, or None when nobody supplies it.

        Raises:
            Invalid: the store has no room for more stand-ins.
        """
        for placed in self._others:
            if name in placed.module.exports:
                return placed.address_of_symbol(name)
        if not self._host.user_space:
            return None
        for placed in self._needed:
            if name in placed.module.exports:
                return placed.address_of_symbol(name)
        return self._stub(name)

    @cached_property
    def _needed(self) -> list[Placed]:
        """The modules it depends on, as the store has them."""
        names = {name.replace("-", "_") for name in self._module.depends}
        found = [v for v in self._earlier if v.name in names]
        return [self._store.placed(v) for v in found if self._store.host(v).user_space]

    def _stub(self, name: str) -> int:
        """Return the place of a stand-in, a new one if need be."""
        index = self._store.index
        is_function = name in index.functions or (
            name not in index.variables and name in self._called
        )
        names = index.functions if is_function else index.variables
        if name not in names:
            names.append(name)
            if FIRST_SLOT + len(index.functions) > SLOTS_MAX or len(names) >= VARIABLES_MAX:
                raise Invalid(f"{self._store.directory}: there is no room for more imports")
        places = index.stubs()
        return dict(places.functions if is_function else places.variables)[name]

    @cached_property
    def _called(self) -> set[str]:
        """The symbols that are functions, not variables: something calls them."""
        elf = self._module.elf
        called = {
            info >> 32
            for section in elf.sections
            if section.is_loaded
            for _, info, _ in elf.relocations(section)
            if info & 0xFFFF_FFFF == PLT32
        }
        return {elf.symbols[number].name for number in called if number < len(elf.symbols)}


def callers_at_hand(
    store: "Store", host: Host, beside: Iterable[Module] = (), adding: Iterable[Module] = ()
) -> Callers:
    """Return what modules that the host has, or had, loaded call, where calls are counted.

    Of those ``beside`` each is known to have been loaded; of those that are being added, and those
    that the store has, the ones that the host has now.

    Raises:
        VfsmapError: one ``beside`` is not what the host has loaded, or can't have been.
    """
    if not counts_calls(host):
        return {}
    found = _bound(beside, host)
    for module in adding:
        if module.name in host.modules and module.name not in found:
            with suppress(VfsmapError):  # of another build, and put elsewhere
                found[module.name] = bind(module, host)
    for variant in store.index.variants:
        if not variant.is_kernel and variant.name in host.modules and variant.name not in found:
            with suppress(VfsmapError):
                found[variant.name] = bind(store.module(variant), host)
    return called_by(found.values())


def callers_of(modules: Iterable[Module], host: Host) -> Callers:
    """Return what modules that the host has, or had, loaded call, where calls are counted.

    Raises:
        VfsmapError: one of them is not what the host has loaded, or can't have been.
    """
    return called_by(_bound(modules, host).values()) if counts_calls(host) else {}


def _bound(modules: Iterable[Module], host: Host) -> dict[str, Bound]:
    return {m.name: bind(m, host) if m.name in host.modules else bind_at(m, host) for m in modules}


def in_order(modules: Sequence[Module]) -> list[Module]:
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

"""Importing PyTorch without the parts that a server of models never calls.

``import torch`` reads well over a thousand modules, half of them for compiling, exporting and
training; on two cores that is more than a second before a model can be opened. Here those
parts become modules that run when something first asks for a name of theirs. What asks after
the import has ended gets all of them, in the order of `DEFERRED`, which is that of PyTorch's
own import: nothing then differs from a plain one.

Only the engine process does this, whose code is ours alone; `coppice.LLM` runs in programs
that are not, and imports PyTorch whole.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import version
from types import ModuleType
from typing import Any

VERSIONS = ("2.13.",)
"""Releases of PyTorch in which this was tried; each needs its tests run anew."""

DEFERRED = (
    "torch.utils.data",
    "torch.ao",
    "torch.nn.intrinsic",
    "torch.nn.qat",
    "torch.nn.quantizable",
    "torch.nn.quantized",
    "torch.distributions",
    "torch.masked",
    "torch.nested",
    "torch.optim",
    "torch.profiler",
    "torch.quantization",
    "torch.quasirandom",
    "torch.signal",
    "torch.sparse",
    "torch._lobpcg",
    "torch._size_docs",
    "torch._storage_docs",
    "torch._tensor_docs",
    "torch.export",
    "torch._higher_order_ops",
    "torch.func",
    "torch._meta_registrations",
    "torch.distributed._meta_registrations",
    "torch.compiler",
    "torch._native",
)
"""Modules that are left for later, with all they import that nothing else has."""

FUNCTIONS = {
    "torch._higher_order_ops": ("cond", "while_loop"),
    "torch.func": ("vmap",),
    "torch.signal": ("windows",),
    "torch._lobpcg": ("lobpcg",),
}
"""Names of theirs that PyTorch's import copies; until they are called, stand-ins do."""


class _Deferred(ModuleType):
    """A module whose code has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system asks for such names, nobody else
            raise AttributeError(name)
        later = self.__dict__["__later__"]
        return later.ask(self, name)


class _There(Loader):
    """Loads a module that was imported while another finder was being asked for it."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module as it is."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Its code has run; only its spec was replaced."""
        module.__spec__ = self._spec


class _Empty(Loader):
    """Makes modules that know whom to ask, and runs nothing."""

    def __init__(self, later: _Later) -> None:
        self._later = later

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module."""
        module = _Deferred(spec.name)
        module.__dict__["__later__"] = self._later
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Later(MetaPathFinder):
    """Finds the deferred modules, and runs them when the time has come."""

    def __init__(self) -> None:
        self.imported = False
        self._loaders: dict[str, Loader] = {}
        self._stand_ins: dict[str, dict[str, Callable[..., Any]]] = {}
        self._lock = threading.RLock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A deferred module's spec; None leaves the search to the others."""
        if not fullname.startswith("torch."):
            return None
        if self.imported:
            self.complete()  # which takes this finder away, and may import the module itself
            found = sys.modules.get(fullname)
            if found is None:
                return None
            # NOTE: importlib takes the spec of a module that has turned up meanwhile, and
            # would run the module again by it.
            found.__spec__ = ModuleSpec(fullname, _There(found))
            return found.__spec__
        if fullname not in DEFERRED:
            parent = fullname.rpartition(".")[0]
            if parent in self._loaders:
                self._run(parent)
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self._loaders[fullname] = spec.loader
            spec.loader = _Empty(self)
        return spec

    def ask(self, module: ModuleType, name: str) -> Any:
        """A name of a deferred module."""
        if self.imported:
            self.complete()
        elif name in FUNCTIONS.get(module.__name__, ()):
            return self._stand_in(module.__name__, name)
        else:
            self._run(module.__name__)
        return getattr(module, name)

    def complete(self) -> None:
        """Import all that was left out; afterwards PyTorch is as if imported at once."""
        with self._lock:
            if not self.imported:
                return
            self.imported = False
            for name in DEFERRED:
                self._run(name)
            sys.meta_path.remove(self)
            torch = sys.modules["torch"]
            for home, functions in self._stand_ins.items():
                for name, stand_in in functions.items():
                    if getattr(torch, name, None) is stand_in:
                        setattr(torch, name, getattr(sys.modules[home], name))

    def _run(self, name: str) -> None:
        """Execute a deferred module's code, unless that has been done."""
        with self._lock:
            loader = self._loaders.pop(name, None)
            if loader is None:
                return
            module = sys.modules[name]
            module.__class__ = ModuleType
            del module.__dict__["__later__"]
            module.__loader__ = loader
            if module.__spec__ is not None:
                module.__spec__.loader = loader
            loader.exec_module(module)

    def _stand_in(self, home: str, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.complete()
            return getattr(sys.modules[home], name)(*args, **kwargs)

        call.__name__ = name
        return self._stand_ins.setdefault(home, {}).setdefault(name, call)


def import_torch() -> None:
    """Import PyTorch, the parts in `DEFERRED` only if they are asked for.

    How its parts hang together is not an interface, so this is done for `VERSIONS` alone; any
    other is imported whole.
    """
    if "torch" in sys.modules or not version("torch").startswith(VERSIONS):
        return
    later = _Later()
    sys.meta_path.insert(0, later)
    importlib.import_module("torch")
    later.imported = True

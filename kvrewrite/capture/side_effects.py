"""Undoes a forward's side effects on flags, attributes and lists, and checks whether a result depends on them.

A trace runs the model's forward on tensors without data. What that writes to modules and to the hooks' lists is
restored. A model that reads state from an earlier call is not a function of its tokens: no cache can carry that state.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

OWN = ("_parameters", "_buffers", "_modules")
CONTAINERS = (list, dict, set, deque)
DEPTH = 4  # nesting of functions and containers


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """Runs the model in eval mode and restores it afterwards: each module's training flag, its attributes and their
    contents, and the lists and dicts that its hooks write to."""
    snapshot = Snapshot(model)
    model.eval()
    try:
        yield snapshot
    finally:
        snapshot.restore()


class Snapshot:
    """The attributes of all modules of a model, and the contents of what they and the modules' hooks refer to."""

    def __init__(self, model: nn.Module):
        self.names = {id(module): name for name, module in model.named_modules()}
        self.attributes = [(module, _attributes(module)) for module in model.modules()]
        self.contents: dict[int, tuple[Any, Any]] = {}
        for _, attributes in self.attributes:
            for name, value in attributes.items():
                self._keep(value, DEPTH if name.endswith("_hooks") else 2)

    def _keep(self, value: Any, depth: int) -> None:
        """Records the contents of a container, of an object, and of those that a function refers to."""
        if depth < 0 or id(value) in self.contents or type(value) is _Left:
            return
        if isinstance(value, CONTAINERS):
            plain = dict if isinstance(value, dict) else set if isinstance(value, set) else list
            self.contents[id(value)] = (value, plain(value))
            for inner in list(value.values() if isinstance(value, dict) else value):
                self._keep(inner, depth - 1)
        elif isinstance(value, functools.partial):
            for inner in (value.func, *value.args, *value.keywords.values()):
                self._keep(inner, depth - 1)
        elif hasattr(value, "__self__") and hasattr(value, "__func__"):
            if not isinstance(value.__self__, nn.Module):
                self._keep(getattr(value.__self__, "__dict__", None), depth - 1)
        elif hasattr(value, "__code__"):
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # an empty cell
                    self._keep(cell.cell_contents, depth - 1)
            for name in value.__code__.co_names:
                if isinstance(value.__globals__.get(name), CONTAINERS):
                    self._keep(value.__globals__[name], 0)
        elif _is_plain(value):
            self._keep(vars(value), depth - 1)

    def changed(self) -> dict[str, tuple[nn.Module, str]]:
        """Returns attributes with a new value or new contents, by the module's name and theirs."""
        found = {}
        for module, before in self.attributes:
            for name, value in _attributes(module).items():
                if name == "training" or name.endswith("_hooks"):
                    continue
                if name not in before or before[name] is not value or not self._as_before(value, DEPTH):
                    path = self.names[id(module)]
                    found[f"{path}.{name}" if path else name] = (module, name)
        return found

    def _as_before(self, value: Any, depth: int) -> bool:
        value = vars(value) if _is_plain(value) else value
        kept = self.contents.get(id(value))
        if kept is None or not depth:
            return True
        inner = value.values() if isinstance(value, dict) else value
        return _same_contents(value, kept[1]) and all(self._as_before(v, depth - 1) for v in inner)

    def restore(self) -> None:
        """Restores everything."""
        for module, before in self.attributes:
            for name in [n for n in _attributes(module) if n not in before]:
                del module.__dict__[name]
            module.__dict__.update(before)
        for value, contents in self.contents.values():
            if _same_contents(value, contents):
                continue
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(contents)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in module.__dict__.items() if name not in OWN}


def _is_plain(value: Any) -> bool:
    """Whether `value` is an object of the model's own class with its own attributes."""
    if type(value) is _Left or isinstance(value, (nn.Module, Tensor, type, *CONTAINERS)):
        return False
    if callable(value) or not hasattr(value, "__dict__"):
        return False
    return not type(value).__module__.startswith(("torch", "builtins"))


def _same_contents(value: Any, contents: Any) -> bool:
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return all(k in contents and contents[k] is v for k, v in value.items())
    if isinstance(value, set):
        return bool(value == contents)
    return all(a is b for a, b in zip(value, contents, strict=True))


class _Read(Exception):
    """Something from an earlier call was used."""


class _Left:
    """Stands for what an earlier call left; any use of it raises."""

    def _used(self, *_: Any, **__: Any) -> Any:
        raise _Read

    __getattr__ = __getitem__ = __iter__ = __len__ = __call__ = __bool__ = __eq__ = __lt__ = __le__ = __gt__ = (
        __ge__
    ) = _used
    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __truediv__ = __matmul__ = __rmatmul__ = (
        __contains__
    ) = _used
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _Read


class Watch:
    """Watches one module's forward: records the attributes that a call writes, and can plant others for the next call.

    torch.export restores some attributes, so both are done around the call itself, during the trace.
    """

    def __init__(self) -> None:
        self.written: dict[
            str, tuple[nn.Module, str, Any]
        ] = {}  # by name: the module, the attribute and what was written
        self.left: dict[str, tuple[nn.Module, str, Any]] = {}  # what the next call finds

    @contextlib.contextmanager
    def call(self, model: nn.Module) -> Iterator[None]:
        """Runs one call of `model` and restores it afterwards."""
        snapshot = Snapshot(model)
        try:
            for module, name, value in self.left.values():
                module.__dict__[name] = value
            before = Snapshot(model)
            yield
            self.written = {n: (module, name, module.__dict__[name]) for n, (module, name) in before.changed().items()}
        finally:
            snapshot.restore()


def depends_on_earlier_calls(watch: Watch, text: str, trace: Callable[[], str], alone: Callable[[], Any]) -> str | None:
    """Returns the attribute, written by a traced call, that the next call's result depends on; None if there is none.

    text: of the trace that wrote it; trace: traces again and returns the text; alone: traces one token per row.
    """
    written = dict(watch.written)
    tensors = {n for n, (_, _, value) in written.items() if _holds_tensors(value)}
    others = {n: at for n, at in written.items() if n not in tensors}
    try:
        # Numbers and the like continue from what the last call left.
        watch.left = others
        if others and trace() != text:
            return next(iter(others))
        for name in sorted(tensors):
            module, attribute, _ = written[name]
            listed = isinstance(module.__dict__.get(attribute), list)
            for run in (trace, alone):
                watch.left = {}
                if not _runs(run):
                    continue  # whatever was left
                watch.left = {name: (module, attribute, [_Left()] if listed else _Left())}
                if not _runs(run):
                    return name
        return None
    finally:
        watch.left = {}


def _runs(run: Callable[[], Any]) -> bool:
    try:
        run()
    except Exception:  # torch.export raises many types
        return False
    return True


def _holds_tensors(value: Any, depth: int = 3) -> bool:
    if isinstance(value, Tensor):
        return True
    if _is_plain(value):
        value = vars(value)
    if depth and isinstance(value, (list, tuple, set, deque)):
        return any(_holds_tensors(v, depth - 1) for v in value)
    return bool(depth) and isinstance(value, dict) and any(_holds_tensors(v, depth - 1) for v in value.values())

"""A class laid over that of one instance: the same name, some methods more, and gone again without a trace."""

from __future__ import annotations

from typing import Any


_CLASSES: dict[tuple[type, type], type] = {}


class Overlay:
    """Base of the classes that are laid over others. Instances copy and pickle as their own class plus the overlay."""

    def __reduce_ex__(self, protocol):  # type: ignore[no-untyped-def]
        # The class is made at run time and has no name to be found by; its two bases have.
        if type(self) not in _CLASSES.values():  # another library's subclass of it
            return super().__reduce_ex__(protocol)
        return _rebuild, type(self).__bases__, self.__dict__


def lay_over(instance: Any, overlay: type[Overlay]) -> None:
    """Gives an instance the methods of an overlay before those of its class."""
    if not isinstance(instance, overlay):
        instance.__class__ = _overlaid(overlay, type(instance))


def take_off(instance: Any, overlay: type[Overlay]) -> None:
    """Takes an overlay off, also from under a subclass that another library made of it."""
    instance.__class__ = _without(type(instance), overlay)


def _overlaid(overlay: type, base: type) -> Any:
    if (overlay, base) not in _CLASSES:
        namespace = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        _CLASSES[overlay, base] = type(base.__name__, (overlay, base), namespace)
    return _CLASSES[overlay, base]


def _without(cls: type, overlay: type) -> type:
    if cls.__bases__[:1] == (overlay,) and cls in _CLASSES.values():
        return cls.__bases__[1]
    if not issubclass(cls, overlay):
        return cls
    bases = tuple(_without(base, overlay) for base in cls.__bases__)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    meta: Any = type(cls)
    return meta(cls.__name__, bases, body)


def _rebuild(overlay: type, base: type) -> Any:
    cls = _overlaid(overlay, base)
    return cls.__new__(cls)

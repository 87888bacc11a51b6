"""What the classes of patched modules have in common: the names of their stock classes.

A patched class bears the names of its stock class, for tools that go by names. It does not equal it: ``==`` would put
both at one place of every dictionary of classes, and ``fully_shard``, for one, keeps its own classes in such a
dictionary.
"""

_NAMES = ("__module__", "__name__", "__qualname__", "__doc__", "__firstlineno__")


class PatchedType(type):
    """The class of patched classes; core.py has them pickled by way of their stock class."""


def rename(stock: type, patched: type) -> None:
    """Give ``patched`` all names of ``stock``."""
    for name in _NAMES:  # __module__ first: setting it deletes __firstlineno__
        if hasattr(stock, name):
            setattr(patched, name, getattr(stock, name))

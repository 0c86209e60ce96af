"""Oriole trains your own bilingual (Chinese + English) chat model from scratch, and lets you talk to it.

    from oriole import Oriole
    m = Oriole("runs/demo")
    print(m.generate("你好！"))

Importing this package is cheap: torch comes in with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oriole.apps.api import Oriole
    from oriole.errors import OrioleError
    from oriole.text.template import Message
    from oriole.text.tokenizer import Tokenizer

__all__ = ["Message", "Oriole", "OrioleError", "Tokenizer", "__version__"]

__version__ = "0.1.0"

_HOMES = {
    "Message": "oriole.text.template",
    "Oriole": "oriole.apps.api",
    "OrioleError": "oriole.errors",
    "Tokenizer": "oriole.text.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module at first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'oriole' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

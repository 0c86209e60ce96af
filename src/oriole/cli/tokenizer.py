"""`oriole tokenizer …`: train, look at, check and extend tokenizers."""

from oriole.cli.common import new_app

__all__ = ["app"]

app = new_app("tokenizer", "Train, report on, show, check and extend tokenizers.")

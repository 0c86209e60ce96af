"""`oriole data …`: from files as they are found to shards that training reads."""

from oriole.cli.common import new_app

__all__ = ["app"]

app = new_app("data", "Clean, deduplicate, fetch, pack and look at data.")

"""Strings to ids and back: reading and cleaning text, the tokenizer, the chat template, token shards; no torch."""

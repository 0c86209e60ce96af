"""ids -> ids: sampling as pure functions on logits, and an engine that batches requests. Knows nothing of text."""

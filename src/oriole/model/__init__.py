"""ids -> vectors: the decoder, its cache, and model folders. Knows nothing of text."""

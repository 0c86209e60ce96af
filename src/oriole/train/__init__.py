"""From token shards to a trained model: batches, objectives, one loop, checkpoints, and the stages built from them."""

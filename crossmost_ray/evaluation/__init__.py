"""Models and shards in, predictions and their counts out."""

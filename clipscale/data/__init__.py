"""Data: stored shards become batches, in an order that depends only on the seed. Only this package reads webdataset tars."""

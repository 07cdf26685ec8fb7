"""clipscale-shards: build and describe data sets of webdataset tars with parquet sidecars."""

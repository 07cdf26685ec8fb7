"""The commands of clipscale-shards, one file each; cli.py lists them."""

"""Fetching media from the web, safely and politely; what is done and refused is documented in docs/shards.md and docs/operations.md."""

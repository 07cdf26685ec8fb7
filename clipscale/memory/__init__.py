"""Batches far beyond memory: gradients cached at the embeddings."""

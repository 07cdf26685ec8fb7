"""Batches far beyond memory: recomputed activations, and gradients cached at the embeddings."""

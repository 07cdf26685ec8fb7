"""Ranks: who they are (mesh) and how they exchange tensors with gradients (collectives)."""

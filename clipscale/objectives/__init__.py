"""Objectives: what a pair's loss is, one file each; they know nothing of ranks, tiles or engines."""

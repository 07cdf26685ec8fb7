"""Planning: what a run will need, before it runs: memory, bytes between ranks, time, money, and what would fit."""

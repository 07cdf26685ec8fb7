"""The demonstration: the real system on data that installed packages hold."""

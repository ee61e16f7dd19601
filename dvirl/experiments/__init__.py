"""Studies and sweeps."""

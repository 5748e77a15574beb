"""The cluster layer: not built yet."""

"""Device layers: `host` (virtual devices on NumPy memory) and `cuda` (CuPy); one small interface, `base`."""

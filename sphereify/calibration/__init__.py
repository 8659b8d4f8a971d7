"""How one layer at a time is fitted to what the original computes: for `calibrate`."""

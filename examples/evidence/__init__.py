"""When a hyperspherical network pays: one program for each question."""

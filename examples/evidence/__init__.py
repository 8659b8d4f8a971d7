"""Where a hyperspherical network pays and where it does not: a program for each question.

Every program trains its networks by `examples.papers.cells`, continues where it stopped, and writes table.md,
figure.png and results.json. `--report` writes them from what has finished, and trains nothing.
"""

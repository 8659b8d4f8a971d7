"""The experiments of "Deep Hyperspherical Learning" and "Learning towards Minimum Hyperspherical Energy", repeated.

Each file is a program: `python -m examples.papers.NAME [--quick | --full] --data FOLDER -o OUTPUT`.
"""

"""The figures of the tutorial: routes and their limits here, what computes them in worker.py."""

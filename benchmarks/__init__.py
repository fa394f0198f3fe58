"""What Stream Trainer costs and what it buys. Run from the root of the repository: `python -m benchmarks.step_cost`.

A package, not a loose folder: opacus installs a package of the same name, which would come first otherwise.
"""

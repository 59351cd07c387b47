"""The fault suite: every kind of bad merge, of real adapters into a real model, in every dtype, is caught and named.

`python -m bench.faults` writes `tests/records/faults.json` and the tables of `docs/verification.md`.
"""

"""Objectives: one module each, the recipe sections in `config.py`, the contract in `base.py`."""

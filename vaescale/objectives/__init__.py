"""What is minimized: one module an objective, its recipe section in `config.py`, the contract in `base.py`."""

"""An additional input of a model, the class of each image: the recipe section in `config.py`, its embedding in `embedding.py`."""

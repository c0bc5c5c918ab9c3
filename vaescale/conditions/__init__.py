"""What a model is told besides the image: the recipe section in `config.py`, its embedding in `embedding.py`."""

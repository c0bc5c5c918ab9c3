"""A network, a posterior and a likelihood make a model; its forward pass returns Terms."""

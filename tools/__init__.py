"""One small program per job: each is a verb of `vaescale` and runs by itself, also under `accelerate launch`."""

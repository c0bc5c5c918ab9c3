"""The aggregate posterior q(z) = E_x q(z|x): encoding, fits, sampling and measures."""

"""The aggregate posterior q(z) = E_x q(z|x): collected, fitted, sampled from."""

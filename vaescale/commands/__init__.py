"""The work of each verb as a Python function: `from vaescale.commands.fit_gmm import fit_gmm`."""

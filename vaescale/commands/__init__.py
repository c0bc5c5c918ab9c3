"""What each verb does, as a function that Python can call: `from vaescale.commands.fit_gmm import fit_gmm`."""

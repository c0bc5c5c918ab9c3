"""The work of each verb as a Python function: `from vaescale.commands.fit_gmm import fit_gmm`."""

# The verbs that may run on several processes, and those that run on one.
DISTRIBUTED = (
    "train",
    "doctor",
    "evaluate",
    "score",
    "quality",
    "encode",
    "fit-gmm",
    "fit-prior",
    "sample",
    "latents",
    "compress",
    "decompress",
)
ALONE = (
    *(
        "make-shards",
        "new-recipe",
        "average",
        "import",
        "verify-shards",
        "sweep",
        "baselines",
        "train-features",
        "compare-runs",
        "export",
        "sync",
        "chaos",
    ),
    *("quickstart", "launch"),
)

"""Studies that are no sets of training runs: each measures, draws, and says whether a claim held."""

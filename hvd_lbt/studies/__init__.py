"""Studies: each trains or measures, draws, and says whether a claim of the papers held."""

"""Pictures in and out: data sets, classes, PNGs with provenance, and where results go."""

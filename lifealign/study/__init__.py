"""Studies: grids of runs over methods, regimes, sequences and seeds, and the tables and figures made of them."""

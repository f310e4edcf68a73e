"""Configuration files, composed by Hydra; a package so that they are found wherever LifeAlign is installed."""

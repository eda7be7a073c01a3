"""Tools beside the recipes: what this machine has, and downloads of models and data. No training
code."""

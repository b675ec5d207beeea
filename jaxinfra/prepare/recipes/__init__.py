"""Recipes: what a config file of `data prepare` returns."""

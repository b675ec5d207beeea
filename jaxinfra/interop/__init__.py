"""Reads and writes models in the formats of Hugging Face: `config.json` and safetensors.

A family of models says once how its parameters are named and laid out there, as a list of `rules.Rule`s; reading and
writing are the same list in two directions.
"""

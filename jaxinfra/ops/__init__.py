"""Kernels, one entry each, every one with a plain reference that runs on any platform."""

"""Kernels, each with a reference implementation that runs on any platform."""

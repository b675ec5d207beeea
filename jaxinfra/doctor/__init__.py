"""Checks the hosts of a run before its first step: each looks at itself, and process 0 compares them."""

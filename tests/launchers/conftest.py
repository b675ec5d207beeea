"""The tiny run, for tests that start it elsewhere."""

from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

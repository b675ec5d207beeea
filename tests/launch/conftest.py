from tiny_run import tiny as tiny
from tiny_run import tiny_data as tiny_data

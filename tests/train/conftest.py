from tests.golden.proven import unless_proven as unless_proven
from tests.tiny_run import tiny as tiny
from tests.tiny_run import tiny_data as tiny_data

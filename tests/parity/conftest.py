from tests.golden.proven import Unless as Unless
from tests.golden.proven import unless_proven as unless_proven

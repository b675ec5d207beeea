"""Where the jobs of preparing data run: in processes of this machine, or on Ray, Dask or Spark.

    run("local", tokenise, jobs, workers=8, done=add)

Every engine gives the same results: a job is a function of its own fields, and may be run twice when its worker dies.
Workers of a cluster must see the same file system and have the same packages as the driver.
"""

from jaxinfra.prepare.engines.run import EngineName, run

__all__ = ["EngineName", "run"]

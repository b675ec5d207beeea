"""Where the jobs of preparing data run: in processes of this machine, or on Ray, Dask or Spark.

    run("local", tokenise, jobs, workers=8, done=add)

Every engine gives the same results: a job is a function of its own fields, and may be run twice when its worker dies.
Workers of a cluster must see the same file system and have the same packages as the driver.

joblib's backends do not hold what `run` promises (joblib 1.6, Ray 2.60, Dask 2026.8, joblibspark 0.6): those of Ray and
Spark give no result before the last one, that of Spark fails on Spark 4, that of Dask waits for ever when a job kills
its worker, and workers of loky outlive a driver that is killed.
"""

from jaxinfra.prepare.engines.run import EngineName, run

__all__ = ["EngineName", "run"]

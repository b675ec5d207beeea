"""Engines run the jobs of preparing data: on processes of this machine, or on Ray, Dask or Spark.

    run_jobs("local", tokenize_job, jobs, workers=8, on_result=add)

All engines give the same results, because a job depends only on its own fields and may run twice if its worker dies.
Workers of a cluster need the same file system and the same packages as the driver.

joblib is not used, because its backends break these promises (joblib 1.6, Ray 2.60, Dask 2026.8, joblibspark 0.6):
Ray and Spark give no result before the last one, Spark fails on Spark 4, Dask waits forever if a job kills its worker,
and loky's workers outlive a killed driver.
"""

from jaxinfra.prepare.engines.run import EngineName, run_jobs

__all__ = ["EngineName", "run_jobs"]

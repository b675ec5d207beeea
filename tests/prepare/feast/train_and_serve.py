"""Applies and materializes a repo, trains on it, and prints what was served and trained on: run by Feast's Python."""

import contextlib
import json
import sys
from datetime import datetime

import numpy as np
import pandas as pd
from feast import FeatureStore
from feast.cli.cli import cli
from features import FeastData

from jaxinfra.cli.main import main

FAST = ("train.steps=2", "track.tensorboard=false", "precision.compute=float32")
data = FeastData(repo="repo")
with contextlib.chdir("repo"):
    cli(["apply"], standalone_mode=False)
FeatureStore("repo").materialize(*map(datetime.fromisoformat, sys.argv[1:]))
code = main(["configs/features.py", "data.repo=repo", "name=features", *FAST])
trained_on = np.concatenate([data.arrays(split)["inputs"] for split in ("train", "validation")])
served = data.online([{"customer_id": int(key)} for key in pd.read_parquet("rows.parquet")["customer_id"]])
np.savez("results.npz", trained_on=trained_on, served=served)
missing = main(["configs/features.py", "data.repo=repo", "name=missing", "data.rows=too_early.parquet", *FAST])
with open("results.json", "w") as file:
    json.dump({"codes": [code, missing], "fingerprint": data.open().fingerprint}, file)

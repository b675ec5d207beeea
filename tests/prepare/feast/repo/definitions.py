"""A repo of one view, with an offline store of files and an online store in SQLite."""

from datetime import timedelta

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Float32, Int64

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.INT64)
activity = FeatureView(
    name="activity",
    entities=[customer],
    ttl=timedelta(0),
    schema=[Field(name="visits", dtype=Int64), Field(name="spend", dtype=Float32)],
    source=FileSource(path="activity.parquet", timestamp_field="event_timestamp"),
)
churn = FeatureService(name="churn", features=[activity])

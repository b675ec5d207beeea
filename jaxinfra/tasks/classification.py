"""Classification: every sample is of one class."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxinfra.config.limits import Decay
from jaxinfra.models.vit import Images, VisionTransformer
from jaxinfra.tasks.task import Field, Task


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Images and their classes.

    Attributes:
        label_smoothing: share of the target that is spread over all classes evenly, in what training minimises
            (Szegedy et al. 2016, section 7); the loss that is reported is the cross-entropy with the class itself.
    """

    modality: ClassVar[str] = "image"
    by_position: ClassVar[bool] = False
    label_smoothing: Decay = 0.0

    def batch(self, data: Images, global_batch: int, *, validation: bool = False) -> dict[str, Field]:
        """Images `[B, H, W, channels]` and labels `[B]`; validation ones have weights `[B]`."""
        shape = (global_batch, data.image_size, data.image_size, data.channels)
        number, label = jnp.dtype("float32"), jnp.dtype("int32")
        images = Field(shape=shape, dtype=number, axes=("batch", None, None, None))
        fields = {"images": images, "labels": Field(shape=shape[:1], dtype=label, axes=("batch",))}
        return fields | ({"weights": Field(shape=shape[:1], dtype=number, axes=("batch",))} if validation else {})

    def finish(
        self, model: VisionTransformer, x_BTD: jax.Array, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sums of cross-entropy in nats, of right answers, and of weights, over the images of the batch."""
        labels_B, logits_BC = batch["labels"], model.logits(x_BTD)
        weights_B = batch["weights"] if "weights" in batch else jnp.ones_like(labels_B, jnp.float32)
        logs_BC = jax.nn.log_softmax(logits_BC)
        hit_BC = labels_B[:, None] == jnp.arange(logits_BC.shape[-1])
        entropy_B = -jnp.sum(jnp.where(hit_BC, logs_BC, 0.0), axis=-1)
        right_B = (jnp.argmax(logits_BC, axis=-1) == labels_B).astype(jnp.float32)
        out = PartitionSpec(unreduced=frozenset(model.partitioner.mesh_axes("batch")))

        def total(values_B: jax.Array) -> jax.Array:
            return jnp.einsum("b,b->", values_B, weights_B, out_sharding=out)

        smooth_B = (1 - self.label_smoothing) * entropy_B - self.label_smoothing * jnp.mean(logs_BC, axis=-1)
        sums = {"loss": entropy_B, "accuracy": right_B, "weight": jnp.ones_like(entropy_B)}
        return total(smooth_B), {name: total(values_B) for name, values_B in sums.items()}

    def scores(self, sums: Mapping[str, float], validation: object) -> dict[str, float]:
        """The loss in nats an image, and the share of right answers."""
        return {name: sums[name] / sums["weight"] for name in ("loss", "accuracy")}

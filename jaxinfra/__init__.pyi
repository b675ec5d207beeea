__version__: str

from .checkpoint.config import CheckpointConfig
from .config import Problem, load, validate
from .data.image_data import ImageData
from .data.in_memory import ArrayData
from .data.interfaces import ArraySpec, DataConfig
from .data.labeled import LabeledData
from .data.mixture import MixSource, Mixture
from .data.pairs import PairData
from .data.tokens import TokenData
from .inference.sampler import Sampler
from .inference.sampling import SamplingParams
from .models.attention import Attention
from .models.delta_net import GatedDeltaNet
from .models.flax_model import FlaxModel
from .models.latent import LatentAttention
from .models.layers import MLP, FeedForward, NormConfig
from .models.mixer import Mixer
from .models.model import ModelConfig
from .models.module import Module
from .models.moe import MixtureOfExperts
from .models.transformer import Layer, TransformerConfig
from .models.vit import VisionTransformerConfig
from .objectives.causal_lm import CausalLM
from .objectives.classification import Classification
from .objectives.dpo import DPO
from .objectives.kto import KTO
from .objectives.objective import Apply, Objective, WithReference
from .objectives.orpo import ORPO
from .ops.logits import FactoredLogits
from .ops.rope import Rope
from .optim.config import LRSchedule, OptimConfig, Optimizer
from .optim.optimizers import SGD, Adafactor, AdamW, Lion, Muon
from .optim.schedules import WSD, Constant, Cosine, InverseSqrt, Linear
from .parallel.mesh_config import MeshConfig
from .parallel.rules import ShardingRules
from .parallel.schedules import PipelineConfig
from .processes.join import join
from .program import Program, TrainState
from .run import Precision, Run, TrainConfig
from .track.base import Tracker, TrackerConfig
from .track.config import TrackConfig
from .train.trainer import Trainer

__version__: str
__all__ = [
    "Adafactor",
    "AdamW",
    "Apply",
    "ArrayData",
    "ArraySpec",
    "Attention",
    "CausalLM",
    "CheckpointConfig",
    "Classification",
    "Constant",
    "Cosine",
    "DPO",
    "DataConfig",
    "FactoredLogits",
    "FeedForward",
    "FlaxModel",
    "GatedDeltaNet",
    "ImageData",
    "InverseSqrt",
    "KTO",
    "LRSchedule",
    "LabeledData",
    "LatentAttention",
    "Layer",
    "Linear",
    "Lion",
    "MLP",
    "MeshConfig",
    "MixSource",
    "Mixer",
    "Mixture",
    "MixtureOfExperts",
    "ModelConfig",
    "Module",
    "Muon",
    "NormConfig",
    "ORPO",
    "Objective",
    "OptimConfig",
    "Optimizer",
    "PairData",
    "PipelineConfig",
    "Precision",
    "Problem",
    "Program",
    "Rope",
    "Run",
    "SGD",
    "Sampler",
    "SamplingParams",
    "ShardingRules",
    "TokenData",
    "TrackConfig",
    "Tracker",
    "TrackerConfig",
    "TrainConfig",
    "TrainState",
    "Trainer",
    "TransformerConfig",
    "VisionTransformerConfig",
    "WSD",
    "WithReference",
    "join",
    "load",
    "validate",
]

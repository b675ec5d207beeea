"""jaxinfra: train JAX models on any mesh from one typed config.

    from jaxinfra import AdamW, OptimConfig, Run, TokenData, Trainer, TransformerConfig

Importing this package imports no JAX and has no side effects: each name of `__init__.pyi` is imported when it is used.
"""

import lazy_loader

__version__ = "0.2.0.dev0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

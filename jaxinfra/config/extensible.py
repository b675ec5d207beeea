"""The base of all classes that users extend with config classes of their own."""

import dataclasses
import os
import pkgutil
import sys
from typing import ClassVar, Self

from jaxinfra.errors import ConfigError

PACKAGE = __name__.partition(".")[0]
KIND = "kind"  # the key that names the chosen class in an encoded config


class Extensible:
    """Base class of open bases; in an annotation, an open base stands for all dataclasses that inherit from it.

        class Optimizer(Extensible, ABC):
            @abstractmethod
            def update(self, grads): ...

        type OptimizerChoice = AdamW | Lion | Optimizer

    An open base is not a dataclass. Its subclasses are frozen dataclasses that define its abstract methods. AdamW and
    Lion are chosen by the names `adam_w` and `lion`, any other subclass of Optimizer by its import path:
    `package.module:Class`, or `FILE.py:Class` if it is defined in the config file FILE.py.
    """

    # Import paths of subclasses that have snake_case names without being in the annotation; imported on first use.
    builtins: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def default(cls) -> Self:
        """Makes an object of the first of the builtins, with the defaults of its fields."""
        return pkgutil.resolve_name(cls.builtins[0])()

    def __new__(cls, *args: object, **fields: object) -> Self:
        """Raises ConfigError for a class that cannot be used in a config."""
        require_complete(cls)
        return super().__new__(cls)


def class_name(cls: type) -> str:
    """Returns `package.module:Class`, or `FILE.py:Class` for a class of a config file or of the script that runs."""
    script = getattr(sys.modules["__main__"], "__file__", None) if cls.__module__ == "__main__" else None
    return f"{os.path.basename(script) if script else cls.__module__}:{cls.__qualname__}"


def is_user_class(cls: type) -> bool:
    """Tells whether a class is defined outside jaxinfra."""
    return cls.__module__.partition(".")[0] != PACKAGE


def require_complete(cls: type) -> None:
    """Raises ConfigError for a subclass of an open base that cannot be used in a config; it says what to add."""
    if problem := _find_problem(cls):
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        raise ConfigError(f"{class_name(cls)}{f' in {file}' if file else ''}: {problem}")


def _find_problem(cls: type) -> str | None:
    """Returns what keeps a class from being used in a config, and what to add to it; None if nothing does."""
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        bases = [base for base in cls.__mro__ if missing[0] in vars(base)]
        return f"does not define {', '.join(missing)} of {bases[0].__name__}; add def {missing[0]}(...) to the class"
    # Not getattr, which inherits: an undecorated subclass of a dataclass would silently lack the fields that it adds.
    params = vars(cls).get("__dataclass_params__")
    if params is None or not params.frozen:
        what = "a dataclass" if params is None else "frozen"
        return f"is not {what}; write @dataclass(frozen=True, kw_only=True) above the class"
    if KIND in (field.name for field in dataclasses.fields(cls)):
        return f"has a field {KIND}, which records use for the name of the class; rename the field"
    return None

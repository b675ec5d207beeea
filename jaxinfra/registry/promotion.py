"""Promotes a version of a model: the alias of the one in use moves to it, if it passes the gate."""

from collections.abc import Sequence
from dataclasses import replace

from jaxinfra.errors import ConfigError
from jaxinfra.failpoints import failpoint
from jaxinfra.registry.gate import Rule, shortfalls
from jaxinfra.registry.versions import Registry, Version
from jaxinfra.track.formatting import format_metric


def check_gate(rules: Sequence[Rule], candidate: Version, champion: Version | None, where: str) -> None:
    """Raises ConfigError with what the candidate lacks, or if the two cannot be compared.

    The champion itself, promoted again, need not beat itself.
    """
    if champion is not None and champion.is_same(candidate):
        rules = [rule for rule in rules if rule.bound is not None]
    compares = champion is not None and any(rule.bound is None for rule in rules)
    if compares and champion is not None and champion.data != candidate.data:
        was = (
            f"was evaluated on data {champion.data[:12] or 'that it does not tell'}, this run on {candidate.data[:12]}"
        )
        fix = "promote on the data of the champion, or compare with a number"
        raise ConfigError(f"{where}: version {champion.number}, {champion.source}, {was}; {fix}")
    if lacking := shortfalls(tuple(rules), candidate.metrics, None if champion is None else champion.metrics):
        stays = f"{where} stays" + ("" if champion is None else f" version {champion.number}, {champion.source}")
        raise ConfigError(f"{candidate.source}: {'; '.join(lacking)}; {stays}")


def promote(registry: Registry, candidate: Version, rules: Sequence[Rule], lease: str) -> Version:
    """Registers a version and moves the alias to it; returns the version that is in use.

    The gate is asked again under the lease, about the champion of that moment: of two that promote at once, the second
    one may lose to the first. Killed at any moment, the same call again does what is left.

    Args:
        registry: the model and the alias.
        candidate: the version, with its evaluation.
        rules: what it must show.
        lease: a folder or bucket prefix for the lease of a new model.
    """
    check_gate(rules, candidate, registry.champion(), registry.target)  # without a trace of what is refused
    with registry.locked(lease) as held:
        champion = registry.champion()
        if champion is not None and champion.is_same(candidate):
            return champion  # by an earlier call, which did not live to say so
        check_gate(rules, candidate, champion, registry.target)
        failpoint("promote", 1)
        version = registry.register(candidate)
        failpoint("promote", 2)
        registry.move(version, champion, held)
        failpoint("promote", 3)
    return replace(version, replaced="" if champion is None else champion.number)


def roll_back(registry: Registry, leaving: str | None = None) -> tuple[Version, Version]:
    """Moves the alias to the version that it named before; returns that one, and the one that it leaves.

    With the number of the version to leave, a second call, after one that was killed, does not go back further.
    """
    if (champion := registry.champion()) is None:
        raise ConfigError(f"{registry.target}: names no version; promote a run first")
    with registry.locked("") as held:
        champion = registry.champion() or champion
        if leaving not in (None, champion.number):
            if (left := registry.version(leaving)).replaced == champion.number:
                return champion, left  # an earlier call has moved it
            raise ConfigError(f"{registry.target}: names version {champion.number}, not {leaving}; look at model show")
        if not champion.replaced:
            raise ConfigError(
                f"{registry.target}: version {champion.number} has replaced none; there is nothing before it"
            )
        before = registry.version(champion.replaced)
        registry.move(before, None, held)
    return before, champion


def described(version: Version) -> str:
    """Returns a version and its metrics in a line."""
    metrics = ", ".join(f"{name} {format_metric(value)}" for name, value in version.metrics.items())
    return f"version {version.number}, {version.source}" + (f" ({metrics})" if metrics else "")

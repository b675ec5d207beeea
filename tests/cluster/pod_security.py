"""The Pod Security Standard "restricted": https://kubernetes.io/docs/concepts/security/pod-security-standards."""

from collections.abc import Iterator
from typing import Any

ENFORCE = "pod-security.kubernetes.io/enforce"


def broken(spec: dict[str, Any]) -> str:
    """Returns what a pod does that it must not, in the words of the admission plugin; "" for nothing."""
    return ", ".join(_broken(spec))


def _broken(spec: dict[str, Any]) -> Iterator[str]:
    pod = spec.get("securityContext", {})
    own = {each["name"]: each.get("securityContext", {}) for each in spec["containers"]}
    hosts = [f"{name}=true" for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    if hosts:
        yield f"host namespaces ({', '.join(hosts)})"
    for volume in spec.get("volumes", ()):
        if "hostPath" in volume:
            yield f'hostPath volumes (volume "{volume["name"]}")'
    checks = [
        ("privileged", 'container{} must not set securityContext.privileged=true',
         lambda of: not of.get("privileged")),
        ("allowPrivilegeEscalation != false", "container{} must set securityContext.allowPrivilegeEscalation=false",
         lambda of: of.get("allowPrivilegeEscalation") is False),
        ("unrestricted capabilities", 'container{} must set securityContext.capabilities.drop=["ALL"]',
         lambda of: "ALL" in of.get("capabilities", {}).get("drop", ())),
        ("runAsNonRoot != true", "pod or container{} must set securityContext.runAsNonRoot=true",
         lambda of: of.get("runAsNonRoot", pod.get("runAsNonRoot")) is True),
        ("runAsUser=0", "container{} must not set runAsUser=0",
         lambda of: of.get("runAsUser", pod.get("runAsUser")) != 0),
        ("seccompProfile", 'pod or container{} must set securityContext.seccompProfile.type to "RuntimeDefault" or '
         '"Localhost"', lambda of: of.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
         in ("RuntimeDefault", "Localhost")),
    ]  # fmt: skip
    for name, message, holds in checks:
        if wrong := [container for container, context in own.items() if not holds(context)]:
            names = ("s " if len(wrong) > 1 else " ") + ", ".join(f'"{each}"' for each in wrong)
            yield f"{name} ({message.format(names)})"

"""What an API server of Kubernetes accepts: kinds, the types of their fields, and the rules between fields.

The types are those of the official client, and for JobSet and TrainJob those of Kubeflow's models. The rules are CEL
expressions of ours for what the API docs, the CRDs and the webhooks of each kind demand.
"""

import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import kubeflow_trainer_api.models as kubeflow
import kubernetes.client as official
from celpy import Environment
from celpy.adapter import json_to_cel

Json = dict[str, Any]

_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
_NAME = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_LABEL_VALUE = r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?"
_QUANTITY = re.compile(r"([+-]?[0-9.]+)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei|[eE][-+]?[0-9]+)?")
_OF_QUANTITIES = re.compile(r"\.(limits|requests|capacity|allocatable|hard)\[[^]]*\]$")
_REASONS = {"Required": "Required", "Unsupported": "NotSupported", "Duplicate": "Duplicate", "Not found": "NotFound"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of object; `model` is the class that has its fields, None if the fields are not looked at."""

    plural: str
    kind: str
    group: str = ""
    version: str = "v1"
    namespaced: bool = True
    model: Any = None

    @property
    def api_version(self) -> str:
        """As objects give it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As refusals give it: "jobs.batch"."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


def _core(names: str, *, namespaced: bool) -> Iterator[Kind]:
    for name in names.split():
        model = getattr(official, "CoreV1Event" if name == "Event" else f"V1{name}")
        yield Kind(plural=f"{name.lower()}s", kind=name, namespaced=namespaced, model=model)


KINDS = (
    *_core("Pod Service Secret ConfigMap ServiceAccount PersistentVolumeClaim Event ResourceQuota", namespaced=True),
    *_core("Namespace Node", namespaced=False),
    Kind(plural="jobs", kind="Job", group="batch", model=official.V1Job),
    Kind(plural="priorityclasses", kind="PriorityClass", group="scheduling.k8s.io", namespaced=False,
         model=official.V1PriorityClass),
    Kind(plural="jobsets", kind="JobSet", group="jobset.x-k8s.io", version="v1alpha2",
         model=kubeflow.JobsetV1alpha2JobSet),
    *(Kind(plural=f"{name.lower()}s", kind=name, group="trainer.kubeflow.org", version="v1alpha1",
           namespaced=name[0] == "T", model=getattr(kubeflow, f"TrainerV1alpha1{name}"))
      for name in ("TrainJob", "TrainingRuntime", "ClusterTrainingRuntime")),
    *(Kind(plural=plural, kind=name, group="kueue.x-k8s.io", version=version, namespaced=name[0] in "LW" and
           name[:9] != "WorkloadP")
      for version in ("v1beta1", "v1beta2") for plural, name in (
          ("localqueues", "LocalQueue"), ("workloads", "Workload"), ("clusterqueues", "ClusterQueue"),
          ("workloadpriorityclasses", "WorkloadPriorityClass"))),
)  # fmt: skip
BY_NAME = {kind.kind: kind for kind in KINDS}


class Refused(Exception):
    """A request that the API server answers with an error."""

    def __init__(self, code: int, reason: str, message: str, details: Json | None = None) -> None:
        super().__init__(message)
        self.code, self.message = code, message
        self.status: Json = {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "details": details or {}, "code": code,
        }  # fmt: skip


def invalid(kind: Kind, name: str, problems: Sequence[tuple[str, str]]) -> Refused:
    """Returns the refusal of an object whose fields break rules; `problems` are pairs of field and message."""
    causes = [
        {"field": where, "message": what, "reason": f"FieldValue{_reason(what)}"} for where, what in problems
    ]  # fmt: skip
    texts = [f"{where}: {what}" for where, what in problems]
    text = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    details = {"name": name, "group": kind.group, "kind": kind.kind, "causes": causes}
    what = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
    return Refused(422, "Invalid", f'{what} "{name}" is invalid: {text}', details)


def forbidden(kind: Kind, name: str, why: str) -> Refused:
    """Returns the refusal of an object by the rules of the cluster."""
    details = {"name": name, "group": kind.group, "kind": kind.plural}
    return Refused(403, "Forbidden", f'{kind.resource} "{name}" is forbidden: {why}', details)


def not_found(kind: Kind, name: str) -> Refused:
    """Returns the refusal of a name that does not exist."""
    details = {"name": name, "group": kind.group, "kind": kind.plural}
    return Refused(404, "NotFound", f'{kind.resource} "{name}" not found', details)


def denied(webhook: str, why: str) -> Refused:
    """Returns the refusal by a webhook of an operator."""
    return Refused(403, "Forbidden", f'admission webhook "{webhook}" denied the request: {why}')


def quantity(value: object) -> float:
    """Returns an amount of a resource as a number; refuses what is none."""
    found = _QUANTITY.fullmatch(str(value))
    if found is None:
        pattern = "'^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
        raise Refused(400, "BadRequest", f"quantities must match the regular expression {pattern}")
    number, unit = found[1], found[2] or ""
    if unit[:1] in ("e", "E") and len(unit) > 1 and unit != "Ei":
        return float(number + unit)
    power = {"m": -1, "": 0}.get(unit, "kmgtpe".find(unit[:1].lower()) + 1)
    return float(number) * (1024**power if unit.endswith("i") else 1000.0**power)


@dataclass
class _Found:
    """What the fields of an object have that their types do not allow."""

    unknown: list[str] = field(default_factory=list[str])
    missing: list[str] = field(default_factory=list[str])
    wrong: list[tuple[str, str, object]] = field(default_factory=list[tuple[str, str, object]])


def decode(kind: Kind, body: Json, validation: str) -> list[str]:
    """Checks the types of all fields, and drops fields that the kind lacks.

    Returns the warnings, with `validation` "Warn"; with "Strict" fields that the kind lacks are refused.
    """
    if kind.model is not None and kind.model.__module__.startswith("kubernetes."):  # a request's path has it, too
        body.update({"apiVersion": kind.api_version, "kind": kind.kind} | body)
    if body.get("apiVersion") != kind.api_version or body.get("kind") != kind.kind:
        got = f"{body.get('apiVersion')}, Kind={body.get('kind')}"
        raise Refused(400, "BadRequest", f"expected {kind.api_version}, Kind={kind.kind}, got {got}")
    found = _Found()
    name = body.get("metadata", {}).get("name", "")
    _check(body, kind.model, "", found) if kind.model is not None else None
    cannot = f'{kind.kind} in version "{kind.version}" cannot be handled as a {kind.kind}: '
    for path, expected, got in found.wrong:
        if kind.model.__module__.startswith("kubernetes."):
            text = f"json: cannot unmarshal {_json_type(got)} into Go struct field {path} of type {expected}"
            raise Refused(400, "BadRequest", cannot + text)
        text = f"{path} in body must be of type {expected}"
        raise invalid(kind, name, [(path, f'Invalid value: "{_json_type(got)}": {text}: "{_json_type(got)}"')])
    unknown = [f'unknown field "{path}"' for path in found.unknown]
    if unknown and validation == "Strict":
        raise Refused(400, "BadRequest", f"{cannot}strict decoding error: {', '.join(unknown)}")
    _set_defaults(kind, body)
    again = _Found()
    _check(body, kind.model, "", again) if kind.model is not None else None
    if again.missing:
        raise invalid(kind, name, [(path, "Required value") for path in again.missing])
    return unknown if validation == "Warn" else []


def check(kind: Kind, body: Json, old: Json | None = None) -> None:
    """Refuses an object that breaks a rule of its kind; `old` is what it was before an update."""
    meta = body["metadata"]
    problems: list[tuple[str, str]] = []
    length = 63 if kind.kind in ("Namespace", "Service") else 253
    if not re.fullmatch(_NAME, meta["name"]) or len(meta["name"]) > length:
        what = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
        what = what if len(meta["name"]) <= length else f"must be no more than {length} characters"
        problems.append(("metadata.name", f'Invalid value: "{meta["name"]}": {what}'))
    for key, value in {**meta.get("labels", {}), **meta.get("annotations", {})}.items():
        if not re.fullmatch(rf"({_NAME}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?", key):
            problems.append(("metadata.labels", f'Invalid value: "{key}": name part must consist of alphanumerics'))
        if key in meta.get("labels", {}) and (len(value) > 63 or not re.fullmatch(_LABEL_VALUE, value)):
            why = "must be no more than 63 bytes" if len(value) > 63 else "a valid label must be an empty string or ..."
            problems.append(("metadata.labels", f'Invalid value: "{value}": {why}'))
    for prefix, spec in _pod_specs(kind, body):
        problems += [(prefix + where, what) for where, what in _broken(_POD, spec, None)]
        for container in spec.get("containers", ()):
            for amounts in container.get("resources", {}).values():
                for amount in amounts.values() if isinstance(amounts, dict) else ():
                    quantity(amount)
    for rule in body["spec"].get("podFailurePolicy", {}).get("rules", ()) if kind.kind == "Job" else ():
        values = rule.get("onExitCodes", {}).get("values", [])
        if values != sorted(set(values)):  # which in CEL takes a step for each pair
            where = "spec.podFailurePolicy.rules[].onExitCodes.values"
            problems.append((where, f"Invalid value: {values}: must be ordered and without duplicates"))
    broken = _broken(_RULES.get(kind.kind, ()), body, old)
    if problems := problems + [(where, what) for where, what in broken if where]:
        raise invalid(kind, meta["name"], problems)
    if broken:  # rules without a field are those of the operator's webhook
        webhook = {"JobSet": "vjobset.kb.io", "TrainJob": "validator.trainjob.trainer.kubeflow.org"}[kind.kind]
        raise denied(webhook, "\n".join(what for _, what in broken))


def _set_defaults(kind: Kind, body: Json) -> None:
    """Fills in what the API server and the webhooks do, before they look at the rules."""
    if kind.kind in ("Pod", "Job", "JobSet", "TrainJob"):
        spec = body.setdefault("spec", {})
    else:
        return
    if kind.kind == "Pod":
        spec.update({"restartPolicy": "Always", "terminationGracePeriodSeconds": 30} | spec)
    if kind.kind == "Job":
        spec.update({"parallelism": 1, "backoffLimit": 6, "completionMode": "NonIndexed", "suspend": False} | spec)
        spec.get("template", {}).get("spec", {}).setdefault("restartPolicy", "Always")
    if kind.kind == "JobSet":
        spec.update({"suspend": False, "replicatedJobs": [], "network": {}, "successPolicy": {"operator": "All"},
                     "startupPolicy": {"startupPolicyOrder": "AnyOrder"}} | spec)  # fmt: skip
        network = spec["network"]
        network.update({"enableDNSHostnames": True, "publishNotReadyAddresses": True} | network)
        for job in spec["replicatedJobs"]:
            job.update({"replicas": 1, "groupName": "default"} | job)
            template = job.get("template", {}).setdefault("spec", {})
            template.setdefault("completionMode", "Indexed")
            template.get("template", {}).get("spec", {}).setdefault("restartPolicy", "OnFailure")
        for number, rule in enumerate(spec.get("failurePolicy", {}).get("rules", ())):
            rule.setdefault("name", f"failurePolicyRule{number}")
    if kind.kind == "TrainJob":
        spec.setdefault("suspend", False)
        spec.setdefault("runtimeRef", {}).setdefault("kind", "ClusterTrainingRuntime")


def _pod_specs(kind: Kind, body: Json) -> Iterator[tuple[str, Json]]:
    if kind.kind == "Pod":
        yield "spec.", body["spec"]
    if kind.kind == "Job":
        yield "spec.template.spec.", body["spec"]["template"].get("spec") or {"containers": []}


def _reason(what: str) -> str:
    return next((reason for start, reason in _REASONS.items() if what.startswith(start)), "Invalid")


def _json_type(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


@functools.cache
def _fields(model: Any) -> Mapping[str, tuple[Any, bool]]:
    """Returns the type of each field of a model, and whether it must be there."""
    if not hasattr(model, "openapi_types"):
        return {of.alias or name: (of.annotation, of.is_required()) for name, of in model.model_fields.items()}
    return {
        key: (model.openapi_types[name], _is_required(model, name)) for name, key in model.attribute_map.items()
    }  # fmt: skip


def _is_required(model: Any, name: str) -> bool:
    blank = object.__new__(model)  # the setters of the official client refuse None for what must be there
    blank.local_vars_configuration = official.Configuration()
    try:
        setattr(blank, name, None)
    except ValueError:
        return True
    return False


def _shape(of: Any) -> tuple[str, Any]:
    """Returns "list" or "map" with the type of its values, "model" with the class, or the name of a JSON type."""
    if isinstance(of, str):
        if found := re.fullmatch(r"(list|dict)\[(?:str, )?(.+)\]", of):
            return {"list": "list", "dict": "map"}[found[1]], found[2]
        scalars = {"str": "string", "int": "integer", "bool": "boolean", "float": "number", "datetime": "string"}
        return ("any", None) if of == "object" else (scalars[of], None) if of in scalars else _shape(vars(official)[of])
    origin, arguments = typing.get_origin(of), typing.get_args(of)
    if origin in (typing.Union, types.UnionType, typing.Annotated):
        return _shape(arguments[0])
    if origin in (list, dict):
        return ("list", arguments[0]) if origin is list else ("map", arguments[1])
    fields = getattr(of, "model_fields", ())
    if hasattr(of, "openapi_types") or (fields and "actual_instance" not in fields):  # else a quantity, or the like
        return "model", of
    return {str: "string", int: "integer", bool: "boolean", float: "number"}.get(of, "any"), None


def _check(value: Any, of: Any, path: str, found: _Found) -> None:
    shape, inner = _shape(of)
    expected = {"list": "array", "map": "object", "model": "object"}.get(shape, shape)
    got = _json_type(value)
    got = "integer" if got == "number" and expected == "integer" and value % 1 == 0 else got
    if shape != "any" and got != expected:
        if not (got == "number" and _OF_QUANTITIES.search(path)):
            found.wrong.append((path, expected, value))
        return
    if shape == "list":
        for number, each in enumerate(value):
            _check(each, inner, f"{path}[{number}]", found)
    if shape == "map":
        for key, each in value.items():
            _check(each, inner, f"{path}[{key}]", found)
    if shape == "model":
        known, dot = _fields(inner), path and "."
        found.unknown += [f"{path}{dot}{key}" for key in value if key not in known]
        found.missing += [f"{path}{dot}{key}" for key, (_, must) in known.items() if must and value.get(key) is None]
        for key in [key for key, each in value.items() if each is None or key not in known]:
            del value[key]
        for key, each in value.items():
            _check(each, known[key][0], f"{path}{dot}{key}", found)


class _Rule(NamedTuple):
    """`holds` must be true where `when` is; both are CEL over `self`, and over `oldSelf` for updates."""

    field: str
    when: str
    holds: str
    message: str


@functools.cache
def _program(expression: str) -> Any:
    environment = Environment()
    return environment.program(environment.compile(expression))


def _broken(rules: Sequence[_Rule], self: Json, old: Json | None) -> list[tuple[str, str]]:
    values = {"self": json_to_cel(self)} | ({"oldSelf": json_to_cel(old)} if old is not None else {})
    used = [rule for rule in rules if old is not None or "oldSelf" not in rule.when + rule.holds]
    return [
        (rule.field, rule.message) for rule in used
        if (not rule.when or _program(rule.when).evaluate(values)) and not _program(rule.holds).evaluate(values)
    ]  # fmt: skip


# Pods: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1
_POD = (
    _Rule("containers", "", "self.containers.size() > 0", "Required value"),
    _Rule("containers", "", "self.containers.all(c, self.containers.filter(d, d.name == c.name).size() == 1)",
          "Duplicate value: names of containers"),
    _Rule("containers[].name", "", f"self.containers.all(c, c.name.matches('{_LABEL}') && c.name.size() <= 63)",
          "Invalid value: a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-'"),
    _Rule("containers[].image", "", "self.containers.all(c, has(c.image) && c.image != '')", "Required value"),
    _Rule("restartPolicy", "has(self.restartPolicy)", "self.restartPolicy in ['Always', 'OnFailure', 'Never']",
          'Unsupported value: supported values: "Always", "Never", "OnFailure"'),
    _Rule("terminationGracePeriodSeconds", "has(self.terminationGracePeriodSeconds)",
          "self.terminationGracePeriodSeconds >= 0", "Invalid value: must be greater than or equal to 0"),
    _Rule("containers[].volumeMounts[].name", "", "self.containers.all(c, !has(c.volumeMounts) || "
          "c.volumeMounts.all(m, has(self.volumes) && self.volumes.exists(v, v.name == m.name)))", "Not found"),
    _Rule("containers[].env[].valueFrom", "", "self.containers.all(c, !has(c.env) || c.env.all(e, "
          "!(has(e.value) && e.value != '' && has(e.valueFrom))))",
          "Invalid value: may not be specified when `value` is not empty"),
    # Resources of devices, whose names have a domain, cannot be overcommitted.
    _Rule("containers[].resources.limits", "", "self.containers.all(c, !has(c.resources) || !has(c.resources.requests) "
          "|| c.resources.requests.all(r, !r.contains('/') || (has(c.resources.limits) && r in c.resources.limits && "
          "c.resources.limits[r] == c.resources.requests[r])))",
          "Required value: Limit must be set for non overcommitable resources"),
)  # fmt: skip

_FAILURES = "has(self.spec.podFailurePolicy)"
_ONE = "self.spec.podFailurePolicy.rules.all(r, {})"
_CODES = _ONE.format("!has(r.onExitCodes) || ({})")
_TEMPLATE = "self.spec.template.spec"
# Jobs: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1
_JOB = (
    _Rule("spec.template.spec.restartPolicy", "", f"{_TEMPLATE}.restartPolicy in ['OnFailure', 'Never']",
          'Required value: valid values: "OnFailure", "Never"'),
    _Rule("spec.completions", "self.spec.completionMode == 'Indexed'", "has(self.spec.completions)",
          "Required value: when completion mode is Indexed"),
    _Rule("spec.completionMode", "", "self.spec.completionMode in ['Indexed', 'NonIndexed']",
          'Unsupported value: supported values: "Indexed", "NonIndexed"'),
    *(_Rule(f"spec.{name}", f"has(self.spec.{name})", f"self.spec.{name} >= 0",
            "Invalid value: must be greater than or equal to 0")
      for name in ("parallelism", "completions", "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")),
    _Rule("metadata.name", "self.spec.completionMode == 'Indexed' && has(self.spec.completions)",
          "(self.metadata.name + '-' + string(self.spec.completions - 1)).size() <= 63",
          "Invalid value: will not able to create pod with invalid DNS label: must be no more than 63 characters"),
    _Rule("spec.template.spec.restartPolicy", _FAILURES, f"{_TEMPLATE}.restartPolicy == 'Never'",
          'Invalid value: "OnFailure": only "Never" is supported when podFailurePolicy is specified'),
    _Rule("spec.podReplacementPolicy", f"{_FAILURES} && has(self.spec.podReplacementPolicy)",
          "self.spec.podReplacementPolicy == 'Failed'", 'Unsupported value: supported values: "Failed"'),
    _Rule("spec.podFailurePolicy.rules", _FAILURES, "self.spec.podFailurePolicy.rules.size() <= 20",
          "Too many: must have at most 20 items"),
    _Rule("spec.podFailurePolicy.rules[].action", _FAILURES,
          _ONE.format("r.action in ['FailJob', 'Ignore', 'Count'] || "
                      "(r.action == 'FailIndex' && has(self.spec.backoffLimitPerIndex))"),
          'Unsupported value: supported values: "Count", "FailJob", "Ignore"'),
    _Rule("spec.podFailurePolicy.rules[]", _FAILURES,
          _ONE.format("has(r.onExitCodes) != (has(r.onPodConditions) && r.onPodConditions.size() > 0)"),
          "Invalid value: specifying one of onExitCodes and onPodConditions is required, and both is not supported"),
    _Rule("spec.podFailurePolicy.rules[].onExitCodes.operator", _FAILURES,
          _CODES.format("r.onExitCodes.operator in ['In', 'NotIn']"),
          'Unsupported value: supported values: "In", "NotIn"'),
    _Rule("spec.podFailurePolicy.rules[].onExitCodes.values", _FAILURES,
          _CODES.format("r.onExitCodes.operator != 'In' || !(0 in r.onExitCodes.values)"),
          "Invalid value: 0: must not be 0 for the In operator"),
    _Rule("spec.podFailurePolicy.rules[].onExitCodes.values", _FAILURES,
          _CODES.format("r.onExitCodes.values.size() >= 1 && r.onExitCodes.values.size() <= 255"),
          "Invalid value: must have 1 to 255 items"),
    _Rule("spec.podFailurePolicy.rules[].onExitCodes.containerName", _FAILURES,
          _CODES.format("!has(r.onExitCodes.containerName) || "
                        f"{_TEMPLATE}.containers.exists(c, c.name == r.onExitCodes.containerName)"),
          "Invalid value: must be one of the container or initContainer names in the pod template"),
    *(_Rule(f"spec.{name}", "", f"has(self.spec.{name}) == has(oldSelf.spec.{name}) && "
            f"(!has(self.spec.{name}) || self.spec.{name} == oldSelf.spec.{name})",
            "Invalid value: field is immutable")
      for name in ("completionMode", "podFailurePolicy", "completions", "backoffLimitPerIndex", "selector")),
    # Of a suspended Job queues may change where its pods go, which this leaves open for the whole template.
    _Rule("spec.template", "!oldSelf.spec.suspend", "self.spec.template == oldSelf.spec.template",
          "Invalid value: field is immutable"),
)  # fmt: skip

_SET = "self.spec.replicatedJobs.all(r, {})"
_POLICY = "has(self.spec.failurePolicy) && has(self.spec.failurePolicy.rules)"
_POLICIES = "self.spec.failurePolicy.rules.all(f, {})"
_KNOWN = "self.spec.replicatedJobs.exists(r, r.name == n)"
_REASONS_OF_JOBS = "BackoffLimitExceeded DeadlineExceeded FailedIndexes MaxFailedIndexesExceeded PodFailurePolicy"
# JobSets: the validation markers of api/jobset/v1alpha2/jobset_types.go, and the checks of its webhook (no field).
_JOBSET = (
    _Rule("spec", "", "!(self.spec.startupPolicy.startupPolicyOrder == 'InOrder' && "
          "self.spec.replicatedJobs.exists(x, has(x.dependsOn)))",
          'Invalid value: "object": StartupPolicy and DependsOn APIs are mutually exclusive'),
    _Rule("spec.replicatedJobs", "", "self.spec.replicatedJobs.all(r, self.spec.replicatedJobs.filter(s, "
          "s.name == r.name).size() == 1)", "Duplicate value: names of replicated jobs"),
    _Rule("spec.failurePolicy.rules", _POLICY, "self.spec.failurePolicy.rules.size() <= 20", "Too many: at most 20"),
    _Rule("spec.failurePolicy.rules[].action", _POLICY,
          _POLICIES.format("f.action in ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']"),
          'Unsupported value: "FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"'),
    _Rule("spec.successPolicy.operator", "", "self.spec.successPolicy.operator in ['All', 'Any']",
          'Unsupported value: supported values: "All", "Any"'),
    *(_Rule(f"spec.{name}", f"has(oldSelf.spec.{name}) || has(self.spec.{name})", f"has(oldSelf.spec.{name}) && "
            f"has(self.spec.{name}) && oldSelf.spec.{name} == self.spec.{name}",
            'Invalid value: "object": Value is immutable')
      for name in ("network", "successPolicy", "failurePolicy", "startupPolicy", "volumeClaimPolicies")),
    _Rule("spec.replicatedJobs", "!oldSelf.spec.suspend && !self.spec.suspend",
          "oldSelf.spec.replicatedJobs == self.spec.replicatedJobs", "Invalid value: field is immutable"),
    _Rule("", "", _SET.format("(self.metadata.name + '-' + r.name + '-0').matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"),
          "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic "
          "character, and end with an alphanumeric character"),
    _Rule("", "", _SET.format("(self.metadata.name + '-' + r.name + '-' + string(r.replicas - 1)).size() <= 63"),
          "JobSet name is too long, job names generated for this JobSet will exceed 63 characters"),
    _Rule("", "", _SET.format("!has(r.template.spec.completions) || (self.metadata.name + '-' + r.name + '-' + "
          "string(r.replicas - 1) + '-' + string(r.template.spec.completions - 1) + '-abcde').size() <= 63"),
          "JobSet name is too long, pod names generated for this JobSet will exceed 63 characters"),
    _Rule("", "has(self.spec.network.subdomain)", "self.spec.network.subdomain.size() <= 63",
          ".spec.network.subdomain is too long, must be less than 63 characters"),
    _Rule("", "self.spec.replicatedJobs.size() > 0", "!has(self.spec.replicatedJobs[0].dependsOn)",
          "DependsOn can't be set for the first ReplicatedJob"),
    _Rule("", "has(self.spec.successPolicy.targetReplicatedJobs)",
          f"self.spec.successPolicy.targetReplicatedJobs.all(n, {_KNOWN})",
          "invalid replicatedJob name in success policy does not appear in .spec.ReplicatedJobs"),
    _Rule("", _POLICY, _POLICIES.format(f"!has(f.targetReplicatedJobs) || f.targetReplicatedJobs.all(n, {_KNOWN})"),
          "invalid replicatedJob name in failure policy does not appear in .spec.ReplicatedJobs"),
    _Rule("", _POLICY, _POLICIES.format("!has(f.onJobFailureReasons) || f.onJobFailureReasons.all(n, "
          f"n in {_REASONS_OF_JOBS.split()})"),
          "invalid job failure reason in failure policy is not a recognized job failure reason"),
    _Rule("", _POLICY, _POLICIES.format("f.name.matches('^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$')"),
          "invalid failure policy rule name, a failure policy rule name must start with an alphabetic character"),
    _Rule("", _POLICY, _POLICIES.format("self.spec.failurePolicy.rules.filter(g, g.name == f.name).size() == 1"),
          "rule names are not unique"),
)  # fmt: skip

# TrainJobs: https://www.kubeflow.org/docs/components/trainer, and the checks of its webhook (no field).
_TRAIN_JOB = (
    _Rule("spec.trainer.numNodes", "has(self.spec.trainer) && has(self.spec.trainer.numNodes)",
          "self.spec.trainer.numNodes >= 1", "Invalid value: should be greater than or equal to 1"),
    _Rule("spec.runtimeRef", "", "self.spec.runtimeRef == oldSelf.spec.runtimeRef",
          'Invalid value: "object": runtimeRef is immutable'),
    _Rule("spec.trainer", "!(has(oldSelf.spec.suspend) && oldSelf.spec.suspend)", "has(self.spec.trainer) == "
          "has(oldSelf.spec.trainer) && (!has(self.spec.trainer) || self.spec.trainer == oldSelf.spec.trainer)",
          'Invalid value: "object": trainer is immutable'),
    _Rule("", "", "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && self.metadata.name.size() <= 63",
          "metadata.name: Invalid value: a DNS-1035 label must start with an alphabetic character"),
)  # fmt: skip

_RULES: dict[str, Sequence[_Rule]] = {"Job": _JOB, "JobSet": _JOBSET, "TrainJob": _TRAIN_JOB}

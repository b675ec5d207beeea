"""Compute Engine, version 1, for tests: templates, workload policies, managed instance groups and their instances.

A group makes what preemption took again, as the real service does: with the name of the lost instance, and another
address. A group of mode BULK has all instances or none.
"""

import itertools
import re
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from google.cloud import compute_v1
from google.protobuf import json_format

from tests.cloud import answers, catalog
from tests.cloud import compute_state as state
from tests.cloud.answers import Asked, Json, Pace, Refused, invalid
from tests.cloud.compute_state import Group, Instance, region_of
from tests.cloud.machines import Machine

if TYPE_CHECKING:
    from tests.cloud.server import Cloud

_PATH = re.compile(
    r"/compute/v1/projects/([^/]+)/(global|aggregated|zones/[^/]+|regions/[^/]+)"
    r"/(\w+)(?:/([^/]+)(?:/(\w+))?)?"
)
_VERBS = {"GET": "get", "POST": "insert", "DELETE": "delete"}
_PERMISSIONS = {"insert": "create", "listManagedInstances": "get", "listErrors": "get"}
_WORDS = {
    "instanceTemplates": "instance template",
    "resourcePolicies": "resource policy",
    "instanceGroupManagers": "managed instance group",
    "instances": "instance",
}
_PROPERTIES = {
    field.json_name for field in compute_v1.InstanceProperties.pb(compute_v1.InstanceProperties()).DESCRIPTOR.fields
}
Plain = compute_v1.InstanceTemplate | compute_v1.ResourcePolicy


class ComputeApi:
    """What the project has in Compute Engine."""

    def __init__(self, cloud: "Cloud") -> None:
        self._cloud = cloud
        self._plain: dict[str, Plain] = {}  # templates and policies, by names such as global/instanceTemplates/a
        self._groups: dict[str, Group] = {}  # by names such as zones/us-east1-d/instanceGroupManagers/a
        self._single: dict[str, Instance] = {}  # instances of no group, by names such as zones/us-east1-d/instances/a
        self._operations: dict[str, tuple[float, Json]] = {}  # when done, and the finished operation
        self._numbers = itertools.count(1)

    # What a test does

    def preempt(self, name: str, after_s: float) -> bool:
        """Preempts an instance, or all of a group; returns whether there are any."""
        chosen = self._called(name)
        for instance in chosen:
            instance.preempt(after_s)
        return bool(chosen)

    def maintenance(self, name: str, start: datetime) -> bool:
        """Plans the maintenance of instances; returns whether there are any."""
        chosen = self._called(name)
        for instance in chosen:
            instance.plan_maintenance(answers.upcoming_maintenance(start))
        return bool(chosen)

    def remaining(self) -> Iterator[str]:
        """Yields what exists and is not being deleted."""
        self._sweep()
        for key in self._plain:
            scope, kind, name = key.rsplit("/", 2)
            yield f"{_WORDS[kind]} {scope.rpartition('/')[2]}/{name}"
        for group in self._groups.values():
            if group.gone_at is None:
                yield f"managed instance group {group.zone}/{group.name}"
                for instance in group.instances:
                    if instance.message is not None:
                        yield f"instance {group.zone}/{instance.name} {instance.status}"
        for instance in self._single.values():
            yield f"instance {instance.zone}/{instance.name} {instance.status}"

    def machines(self) -> Iterator[Machine]:
        """Yields the machines of all instances."""
        for instance in self._all():
            if instance.machine is not None:
                yield instance.machine

    def _all(self) -> list[Instance]:
        groups = [instance for group in self._groups.values() for instance in group.instances]
        return [*groups, *self._single.values()]

    def _called(self, name: str) -> list[Instance]:
        """Returns the instances that run, of this name or of the group of this name."""
        groups = [instance for group in self._groups.values() if group.name == name for instance in group.instances]
        return [each for each in groups or self._all() if each.status == "RUNNING" and (groups or each.name == name)]

    # Requests

    def answer(self, asked: Asked) -> Json:
        """Returns the JSON of an answer."""
        self._sweep()
        match = _PATH.fullmatch(asked.path)
        if match is None:
            raise Refused(404, "NOT_FOUND", "Not Found")
        project, scope, kind, name, verb = match.groups()
        self._cloud.check_project(project)
        place = scope.partition("/")[2]
        if scope.startswith("zones/") and place not in catalog.ZONES:
            raise answers.bad_field("zone", place, "Unknown zone.")
        if scope.startswith("regions/") and place not in set(map(region_of, catalog.ZONES)):
            raise answers.bad_field("region", place, "Unknown region.")
        action = verb or ("list" if asked.method == "GET" and name is None else _VERBS.get(asked.method, ""))
        if kind == "operations":
            return self._operation_of(scope, name or "")
        where = f"projects/{project}/{scope}/{kind}" + (f"/{name}" if name else "")
        self._cloud.require(asked, f"compute.{kind}.{_PERMISSIONS.get(action, action)}", where)
        handler = getattr(self, f"_{action}_{kind}", None) or getattr(self, f"_{action}_plain", None)
        if handler is None or kind not in _WORDS:
            raise Refused(404, "NOT_FOUND", "Not Found")
        if action in ("list", "insert"):
            return handler(asked, scope, kind) if action == "list" else handler(asked, scope)
        return handler(asked, scope, f"{scope}/{kind}/{name}")

    def _insert_instanceTemplates(self, asked: Asked, scope: str) -> Json:
        message = compute_v1.InstanceTemplate()
        asked.parsed = answers.render(answers.parse(asked.body, compute_v1.InstanceTemplate.pb(message)))
        state.check_name(message.name)
        state.check_properties(message.properties, self._cloud.reservations)
        for account in message.properties.service_accounts:
            email = self._cloud.service_account if account.email == "default" else account.email
            self._cloud.require(asked, "iam.serviceAccounts.actAs", f"projects/-/serviceAccounts/{email}")
        return self._keep(message, scope, "instanceTemplates")

    def _insert_resourcePolicies(self, asked: Asked, scope: str) -> Json:
        message = compute_v1.ResourcePolicy()
        asked.parsed = answers.render(answers.parse(asked.body, compute_v1.ResourcePolicy.pb(message)))
        state.check_policy(message)
        message.status = "READY"
        return self._keep(message, scope, "resourcePolicies")

    def _keep(self, message: Plain, scope: str, kind: str) -> Json:
        key = f"{scope}/{kind}/{message.name}"
        if key in self._plain:
            raise answers.exists(self._full(key))
        message.id, message.self_link = next(self._numbers), self._link(key)
        message.creation_timestamp = answers.now()
        self._plain[key] = message
        return self._operation(scope, "insert", key)

    def _get_plain(self, asked: Asked, scope: str, key: str) -> Json:
        del asked, scope
        return self._show_plain(self._plain[self._need(self._plain, key)])

    def _show_plain(self, message: Plain) -> Json:
        return answers.render(type(message).pb(message))

    def _delete_plain(self, asked: Asked, scope: str, key: str) -> Json:
        del asked
        self._need(self._plain, key)
        for name, group in self._groups.items():
            if key in (group.template, group.policy):
                message = f"The resource '{self._full(key)}' is already being used by '{self._full(name)}'"
                raise Refused(400, "FAILED_PRECONDITION", message, reason="resourceInUseByAnotherResource")
        del self._plain[key]
        return self._operation(scope, "delete", key)

    def _insert_instanceGroupManagers(self, asked: Asked, scope: str) -> Json:
        message, zone = compute_v1.InstanceGroupManager(), scope.partition("/")[2]
        asked.parsed = answers.render(answers.parse(asked.body, compute_v1.InstanceGroupManager.pb(message)))
        versions = [version.instance_template for version in message.versions]
        template = _without_project(message.instance_template or "".join(versions[:1]))
        policy = _without_project(message.resource_policies.workload_policy)
        for key in filter(None, (template, policy)):
            self._need(self._plain, key)
        made_from = self._plain.get(template)
        if not isinstance(made_from, compute_v1.InstanceTemplate):
            raise invalid("Required field 'resource.instanceTemplate' not specified")
        workload = self._plain.get(policy)
        policies = [workload.workload_policy] if isinstance(workload, compute_v1.ResourcePolicy) else []
        topology = "".join(each.accelerator_topology for each in policies)
        state.check_group(message, zone, made_from.properties.machine_type, topology)
        if policy and not policy.startswith(f"regions/{region_of(zone)}/"):
            raise answers.bad_field("resource.resourcePolicies.workloadPolicy", policy, "It is of another region.")
        key = f"{scope}/instanceGroupManagers/{message.name}"
        if key in self._groups:
            raise answers.exists(self._full(key))
        message.base_instance_name = message.base_instance_name or message.name
        message.id, message.self_link, message.zone = next(self._numbers), self._link(key), self._link(scope)
        message.creation_timestamp = answers.now()
        instances = [
            Instance(name=name, zone=zone, properties=made_from.properties, created_by=self._full(key))
            for name in state.instance_names(message.base_instance_name, message.name, message.target_size)
        ]
        self._groups[key] = Group(message=message, zone=zone, template=template, policy=policy, instances=instances)
        return self._operation(scope, "insert", key)

    def _get_instanceGroupManagers(self, asked: Asked, scope: str, key: str) -> Json:
        del asked, scope
        return self._read(self._groups[self._need(self._groups, key)]).show()

    def _delete_instanceGroupManagers(self, asked: Asked, scope: str, key: str) -> Json:
        del asked
        group = self._groups[self._need(self._groups, key)]
        group.gone_at = time.monotonic() + self._cloud.delay_s
        for instance in group.instances:
            instance.action = "DELETING"
            self._cloud.later(instance.power_off)
        return self._operation(scope, "delete", key)

    def _listManagedInstances_instanceGroupManagers(self, asked: Asked, scope: str, key: str) -> Json:
        del scope
        group = self._read(self._groups[self._need(self._groups, key)])
        shown, token = answers.page(group.instances, asked.query, "maxResults")
        base = f"{self._cloud.endpoint}/compute/v1/projects/{self._cloud.project}"
        found = [instance.show_managed(base) for instance in shown]
        return {"managedInstances": found} | ({"nextPageToken": token} if token else {})

    def _listErrors_instanceGroupManagers(self, asked: Asked, scope: str, key: str) -> Json:
        del scope
        group = self._read(self._groups[self._need(self._groups, key)])
        shown, token = answers.page(group.errors[::-1], asked.query, "maxResults")
        return {"items": list(shown)} | ({"nextPageToken": token} if token else {})

    def _insert_instances(self, asked: Asked, scope: str) -> Json:
        message, zone = compute_v1.Instance(), scope.partition("/")[2]
        asked.parsed = answers.render(answers.parse(asked.body, compute_v1.Instance.pb(message)))
        state.check_name(message.name)
        kind = message.machine_type.rpartition("/")[2]
        given = {name: value for name, value in asked.parsed.items() if name in _PROPERTIES}
        properties = compute_v1.InstanceProperties()
        json_format.ParseDict(given | {"machineType": kind}, compute_v1.InstanceProperties.pb(properties))
        state.check_properties(properties, self._cloud.reservations)
        key = f"{scope}/instances/{message.name}"
        if key in self._instances():
            raise answers.exists(self._full(key))
        if catalog.machine_type(zone, kind) is None:
            raise answers.bad_field("resource.machineType", kind, f"Machine type does not exist in zone '{zone}'.")
        instance = Instance(name=message.name, zone=zone, properties=properties)
        if self._cloud.is_out_of_stock(zone):
            return self._operation(scope, "insert", key, state.stockout(zone, self._cloud.project))
        instance.provision(self._base, next(self._numbers))
        self._single[key] = instance
        return self._operation(scope, "insert", key)

    def _get_instances(self, asked: Asked, scope: str, key: str) -> Json:
        del asked, scope
        self._read_all()
        return self._instances()[self._need(self._instances(), key)].show()

    def _delete_instances(self, asked: Asked, scope: str, key: str) -> Json:
        del asked
        instance = self._instances()[self._need(self._instances(), key)]
        self._single.pop(key, None)
        instance.action = "RECREATING"
        self._cloud.later(instance.power_off)
        return self._operation(scope, "delete", key)

    def _setMetadata_instances(self, asked: Asked, scope: str, key: str) -> Json:
        instance = self._instances()[self._need(self._instances(), key)]
        message = compute_v1.Metadata()
        asked.parsed = answers.render(answers.parse(asked.body, compute_v1.Metadata.pb(message)))
        assert instance.message is not None
        if message.fingerprint != instance.message.metadata.fingerprint:
            why = "Supplied fingerprint does not match current metadata fingerprint."
            raise Refused(412, "FAILED_PRECONDITION", why, reason="conditionNotMet")
        answers.check_metadata({item.key: item.value for item in message.items})
        message.fingerprint = state.fingerprint(message)
        instance.message.metadata = message
        for item in message.items if instance.machine is not None else ():
            assert instance.machine is not None
            instance.machine.set(f"attributes/{item.key}", item.value)
        return self._operation(scope, "setMetadata", key)

    def _list_plain(self, asked: Asked, scope: str, kind: str) -> Json:
        """Lists a zone or region, or everything by zone and region."""
        self._read_all()
        shown: Mapping[str, Json]
        if kind == "instances":
            shown = {key: instance.show() for key, instance in self._instances().items()}
        elif kind == "instanceGroupManagers":
            shown = {key: group.show() for key, group in self._groups.items()}
        else:
            shown = {key: self._show_plain(message) for key, message in self._plain.items()}
        wanted = asked.query.get("filter", "")
        items = [(key, item) for key, item in shown.items() if f"/{kind}/" in key and state.matches(item, wanted)]
        if scope != "aggregated":
            items = [(key, item) for key, item in items if key.startswith(f"{scope}/")]
        part, token = answers.page(items, asked.query, "maxResults")
        found: Json = {"kind": f"compute#{kind}List"} | ({"nextPageToken": token} if token else {})
        if scope != "aggregated":
            return found | {"items": [item for _, item in part]}
        scopes = {key.rsplit("/", 2)[0] for key, _ in part}
        by_scope = {each: [item for key, item in part if key.startswith(f"{each}/{kind}/")] for each in sorted(scopes)}
        return found | {"items": {each: {kind: inside} for each, inside in by_scope.items()}}

    # States

    @property
    def _base(self) -> str:
        return f"{self._cloud.endpoint}/compute/v1/projects/{self._cloud.project}"

    def _instances(self) -> dict[str, Instance]:
        """Returns the instances that exist."""
        return {f"zones/{each.zone}/instances/{each.name}": each for each in self._all() if each.message is not None}

    def _read_all(self) -> None:
        for group in self._groups.values():
            self._read(group)
        for instance in self._single.values():
            if instance.pace.is_due(self._cloud.delay_s):
                instance.advance(self._cloud)

    def _read(self, group: Group) -> Group:
        """Moves the instances of a group one state on, if it is time."""
        if group.gone_at is not None:
            return group
        wanted: list[Instance] = []
        for instance in group.instances:
            is_due = instance.pace.is_due(self._cloud.delay_s)
            if instance.is_lost and instance.action != "NONE":
                wanted += [instance] if is_due else []
            elif is_due and instance.message is not None:
                instance.advance(self._cloud)
            if instance.is_lost and instance.action == "NONE" and group.repairs:
                instance.action, instance.pace = "RECREATING", Pace(seen=True)
        for tried in [wanted] if group.is_bulk and wanted else [[instance] for instance in wanted]:
            if error := self._shortage(group, tried):
                group.failed(tried, error)
                continue
            for instance in tried:
                instance.provision(self._base, next(self._numbers))
        return group

    def _shortage(self, group: Group, wanted: list[Instance]) -> Json | None:
        """Returns why instances cannot be made now, or None."""
        chip, chips = wanted[0].chips
        used = sum(each.chips[1] for each in self._all() if each.chips[0] == chip and each.message is not None)
        limit = self._cloud.quota.get(chip)
        if limit is not None and used + chips * len(wanted) > limit:
            return state.over_quota(chip, limit, group.zone, spot=wanted[0].is_spot)
        if self._cloud.is_out_of_stock(group.zone):
            return state.stockout(group.zone, self._cloud.project)
        return None

    def _sweep(self) -> None:
        """Forgets what was deleted some time ago."""
        now = time.monotonic()
        self._groups = {key: each for key, each in self._groups.items() if each.gone_at is None or each.gone_at > now}

    # Names and operations

    def _full(self, key: str) -> str:
        return f"projects/{self._cloud.project}/{key}"

    def _link(self, key: str) -> str:
        return f"{self._base}/{key}"

    def _need(self, known: Mapping[str, object], key: str) -> str:
        if key not in known:
            raise answers.not_found(self._full(key))
        return key

    def _operation(self, scope: str, verb: str, key: str, error: Json | None = None) -> Json:
        """Starts an operation, which is done at once if states do not last."""
        name = f"operation-{next(self._numbers)}"
        shown: Json = {"kind": "compute#operation", "name": name, "operationType": verb, "targetLink": self._link(key)}
        shown |= {"id": str(next(self._numbers)), "insertTime": answers.now()}
        shown["selfLink"] = self._link(f"{scope}/operations/{name}")
        if scope != "global":
            shown[scope.partition("s/")[0]] = self._link(scope)
        if error is not None:
            shown |= {"error": {"errors": [error]}, "httpErrorStatusCode": 503}
            shown["httpErrorMessage"] = "SERVICE UNAVAILABLE"
        json_format.ParseDict(shown, compute_v1.Operation.pb(compute_v1.Operation()))
        self._operations[f"{scope}/{name}"] = (time.monotonic() + self._cloud.delay_s, shown)
        return self._operation_of(scope, name)

    def _operation_of(self, scope: str, name: str) -> Json:
        if f"{scope}/{name}" not in self._operations:
            raise answers.not_found(self._full(f"{scope}/operations/{name}"))
        done_at, shown = self._operations[f"{scope}/{name}"]
        if time.monotonic() >= done_at:
            return shown | {"status": "DONE", "progress": 100, "endTime": answers.now()}
        return {key: value for key, value in shown.items() if not re.match("error|http", key)} | {"status": "RUNNING"}


def _without_project(link: str) -> str:
    """Returns the name that a link means, without its project."""
    return re.sub(r"^(.*/)?projects/[^/]+/", "", link)

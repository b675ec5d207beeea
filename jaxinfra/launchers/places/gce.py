"""Machines of Compute Engine: a group or a machine that exists, or groups that a template makes, one for each slice."""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

from jaxinfra.errors import ConfigError
from jaxinfra.launchers.places import gce_messages as messages
from jaxinfra.launchers.places.gce_messages import compute_module, region_of
from jaxinfra.launchers.places.google_cloud import (
    LABEL,
    RUN_LABEL,
    SSH_KEYS,
    GooglePlace,
    Origin,
    api_url,
    body_of,
    call,
    change,
    client_of,
    find,
    items_of,
    refusal,
)
from jaxinfra.launchers.places.google_errors import Stockout, error_of
from jaxinfra.launchers.places.images import Machines, machines_of
from jaxinfra.launchers.places.place import Host, PlaceOptions, Request, Resource, Say

_COMING = {"PENDING", "PROVISIONING", "STAGING", "REPAIRING"}
_TEMPLATE, _POLICY = "instance template", "resource policy"
_GROUPS, _INSTANCES = "InstanceGroupManagers", "Instances"  # kinds of clients
_TEMPLATES, _POLICIES = "InstanceTemplates", "ResourcePolicies"
_FATAL = ("PERMISSION", "FORBIDDEN", "INVALID", "NOT_FOUND", "UNSUPPORTED")  # parts of codes


class Gce(GooglePlace):
    """See `HostSource`."""

    def __init__(self, options: PlaceOptions, run_location: str, *, poll_s: float = 2.0) -> None:
        super().__init__(options, run_location, poll_s=poll_s)
        self._machines = machines_of(self.topology) if self.topology else None
        name, slices = self.options.name, self.topology.slices if self.topology else 1
        self._names = [f"{name}-{index}" for index in range(slices)] if slices > 1 else [name]
        self._in_zone = {"project": self.options.project, "zone": self.options.zone}
        self._in_region = {"project": self.options.project, "region": region_of(self.options.zone)}
        self._what = f"{self.options.name} in {self.options.zone}"
        self._client = cache(_client)  # by kind

    def step(self, say: Say) -> Sequence[Host] | str:
        """See `GooglePlace.step`."""
        if (machines := self._machines) is None:
            return self._step_existing()
        groups = {name: self._group(name) for name in self._names}
        for group in groups.values():
            if group is not None:
                self.check_owner("managed instance group", group.description)
        missing = [name for name, group in groups.items() if group is None]
        if missing:
            if len(missing) == len(groups):  # those of an earlier start may have had other options
                self._delete_rest(lambda kind, found: not self._is_alike(kind, found, machines))
            for name in missing:
                self._make(say, machines, name)
            return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} requested"
        for name, group in groups.items():
            if waiting := self._look(say, name, group):
                return waiting
        return self._hosts_of(self._names) or f"the addresses of {self._what} are not known"

    def _look(self, say: Say, name: str, group: Any) -> str:
        """Returns what a group lacks, "" if all its machines run; deletes it if it will not get them."""
        members = self._members(name)
        running = sum(member.instance_status == "RUNNING" for member in members)
        if running == group.target_size:
            return ""
        # Errors of earlier tries are still told while machines boot.
        is_coming = running or any(member.instance_status in _COMING for member in members)
        problem = "" if is_coming else self._problem(name, group, members)
        lost, count = self._lost_member(members), f"{running} of {group.target_size} machines of {name} are running"
        if group.status.is_stable and not group.status.bulk_instance_operation.in_progress:
            lost = lost or f"only {count}"  # and nothing changes that
        # A group tries again by itself, but how often is not said, and not after each error.
        if lost or (problem and self.may_retry()):
            if lost:
                say(f"{name}: {lost}; deletes it to make it again")
            self._delete_group(name)
            return problem or f"{name} is to be made again"
        return problem or count

    def current(self) -> Sequence[Host]:
        """See `HostSource.current`."""
        self.has_asked = True
        if self._machines is None:
            if found := self._existing():
                return self._hosts_of(found)
            machine = self._machine()
            running = machine is not None and machine.status == "RUNNING"
            return self._hosts([machine], 0) if running else ()
        groups = [self._group(name) for name in self._names]
        if not all(group is not None and self.is_ours(group.description) for group in groups):
            return ()
        return self._hosts_of(self._names)

    def lost(self) -> str:
        """See `HostSource.lost`."""
        self.has_asked = True
        names = self._names if self._machines is not None else self._existing()
        if not names:
            status = self._single().status
            return "" if status == "RUNNING" else f"{self.options.name} {status.lower()}"
        for name in names:
            group = self._group(name)
            if group is None:
                return f"{name} deleted"
            members = self._members(name)
            if reason := self._lost_member(members):
                return reason
            running = sum(member.instance_status == "RUNNING" for member in members)
            if running < group.target_size:
                return f"{group.target_size - running} of {group.target_size} machines of {name} do not run"
        return ""

    def delete(self, say: Say, only: Collection[str] | None) -> None:
        """See `GooglePlace.delete`."""
        if self._machines is None:
            return
        others = False
        for name in self._names:
            group = self._group(name)
            if group is not None and only is not None and name not in only:
                others = True
            elif group is not None and self.is_ours(group.description):
                self._delete_group(name)
                say(f"deleted managed instance group {name} in {self.options.zone}, and its machines")
        if others:  # which are made from the template
            return
        for deleted in self._delete_rest(lambda kind, _: only is None or kind in only):
            say(f"deleted {deleted}")

    def _delete_rest(self, is_due: Callable[[str, Any], bool]) -> list[str]:
        """Deletes the template and the policy, if they are of this run and due; returns what was deleted."""
        name, deleted = self.options.name, list[str]()
        for kind, client, request in (
            (_TEMPLATE, self._client(_TEMPLATES), {"project": self.options.project, "instance_template": name}),
            (_POLICY, self._client(_POLICIES), {**self._in_region, "resource_policy": name}),
        ):
            what = f"delete {kind} {name}"
            found = find(what, client.get, request)
            is_due_now = found is not None and self.is_ours(found.description) and is_due(kind, found)
            if is_due_now and (operation := self.ask_to_delete(what, client.delete, request)) is not None:
                self._finish(what, operation)
                deleted.append(f"{kind} {name}")
        return deleted

    def _is_alike(self, kind: str, found: Any, machines: Machines) -> bool:
        """Whether a template or policy is what this run would make, as that which another machine has just made."""
        if kind == _TEMPLATE:
            return messages.content_of(found) == messages.content_of(self._template(machines, makes_key=False))
        has, wanted = found.workload_policy, self._policy(machines).workload_policy
        return has.type_ == wanted.type_ and has.accelerator_topology == wanted.accelerator_topology

    def requests(self) -> Sequence[Request]:
        """See `HostSource.requests`."""
        name, machines = self.options.name, self._machines
        base = f"{api_url('compute')}/compute/v1/projects/{self.options.project}"
        zone, region = f"{base}/zones/{self.options.zone}", f"{base}/regions/{region_of(self.options.zone)}"
        groups, rest, scopes = [f"{zone}/instanceGroupManagers/{each}" for each in self._names], [], [zone]
        if machines is not None:
            rest.append((f"{base}/global/instanceTemplates", self._template(machines, makes_key=False)))
            scopes.append(f"{base}/global")
        if machines is not None and messages.needs_policy(machines):
            rest.insert(0, (f"{region}/resourcePolicies", self._policy(machines)))
            scopes.append(region)
        sent = [Request("GET", group, "sees whether it exists") for group in groups]
        for url, message in rest:
            sent.append(Request("GET", f"{url}/{name}", "sees whether it exists"))
            sent.append(Request("POST", url, f"makes {name}", body_of(message)))
        for group, each in zip(groups, self._names, strict=True):
            if machines is not None:
                body = body_of(self._message(machines, each))
                sent.append(Request("POST", group.rpartition("/")[0], f"makes {each}, and its machines", body))
            sent.append(Request("POST", f"{group}/listManagedInstances", "sees whether its machines run"))
        sent += [Request("GET", f"{scope}/operations/OPERATION", "sees whether it is done") for scope in scopes]
        label = "" if machines is None else f"?filter=labels.{RUN_LABEL}={self.labels[RUN_LABEL]}"
        machine, items = f"{zone}/instances/MACHINE", f'{{"items": [..., {{"key": "{SSH_KEYS}", "value": "..."}}]}}'
        sent += [
            Request("GET", f"{zone}/instances{label}", "reads the addresses"),
            Request("POST", f"{machine}/setMetadata", "if it does not have this ssh key", items),
            Request("GET", machine, "sees whether the key stays"),
        ]
        made = [] if machines is None else [*groups, *(f"{url}/{name}" for url, _ in reversed(rest))]
        return [*sent, *(Request("DELETE", url, "at the end, or to make it again") for url in made)]

    def deletion(self) -> Sequence[str]:
        """Returns the URLs of the groups; the template and the policy cost nothing."""
        if self._machines is None:
            return ()
        zone = f"{api_url('compute')}/compute/v1/projects/{self.options.project}/zones/{self.options.zone}"
        return [f"{zone}/instanceGroupManagers/{name}" for name in self._names]

    def _policy(self, machines: Machines) -> Any:
        return messages.policy_message(self.options, machines, str(self.origin))

    def _template(self, machines: Machines, *, makes_key: bool = True) -> Any:
        key = self.key_line(makes_key=makes_key)
        return messages.template_message(self.options, machines, str(self.origin), self.labels, key)

    def _message(self, machines: Machines, name: str) -> Any:
        return messages.group_message(self.options, machines, str(self.origin), name)

    def _make(self, say: Say, machines: Machines, name: str) -> None:
        what = f"--create {self.topology} in {self.options.zone}"
        if messages.needs_policy(machines):
            request = {**self._in_region, "resource_policy": self.options.name}
            if not self._has(_POLICY, find(what, self._client(_POLICIES).get, request)):
                body = {**self._in_region, "resource_policy_resource": self._policy(machines)}
                self._insert(what, self._client(_POLICIES), body, _POLICY)
        project = {"project": self.options.project}
        request = {**project, "instance_template": self.options.name}
        if not self._has(_TEMPLATE, find(what, self._client(_TEMPLATES).get, request)):
            body = {**project, "instance_template_resource": self._template(machines)}
            self._insert(what, self._client(_TEMPLATES), body, _TEMPLATE)
        body = {**self._in_zone, "instance_group_manager_resource": self._message(machines, name)}
        self._insert(what, self._client(_GROUPS), body, name)
        say(f"requested {machines.hosts} {machines.machine} in {self.options.zone} as managed instance group {name}")

    def _insert(self, what: str, client: Any, request: dict[str, Any], made: str) -> None:
        self.check_goes_on()
        operation = change(what, client.insert, request)
        self.made.add(made)
        self._finish(what, operation)

    def _finish(self, what: str, operation: Any) -> None:
        """Waits for the end of an operation; its own `result` would ask the public endpoint, whatever the client's."""
        scope, request = "Global", {"project": self.options.project, "operation": operation.name}
        if operation.zone:
            scope, request["zone"] = "Zone", self.options.zone
        elif operation.region:
            scope, request["region"] = "Region", region_of(self.options.zone)
        client = self._client(f"{scope}Operations")

        def has_ended() -> bool:
            now = call(what, client.get, request)
            is_done = now.status == type(now).Status.DONE
            if is_done and now.error.errors:
                first = now.error.errors[0]
                raise refusal(what, now.http_error_status_code, f"{first.code}: {first.message}")
            return is_done

        self.wait_for(what, operation.name, has_ended)

    def _has(self, kind: str, found: Any) -> bool:
        if found is not None:
            self.check_owner(kind, found.description)
        return found is not None

    def _group(self, name: str) -> Any:
        return find(self._what, self._client(_GROUPS).get, {**self._in_zone, "instance_group_manager": name})

    def _members(self, name: str) -> list[Any]:
        request = {**self._in_zone, "instance_group_manager": name}
        method = self._client(_GROUPS).list_managed_instances
        return find(self._what, lambda **asked: list(method(**asked)), request) or []

    def _delete_group(self, name: str) -> None:
        what = f"delete managed instance group {name}"
        request = {**self._in_zone, "instance_group_manager": name}
        if (operation := self.ask_to_delete(what, self._client(_GROUPS).delete, request)) is not None:
            self._finish(what, operation)

    def _lost_member(self, members: Sequence[Any]) -> str:
        for member in members:
            if member.current_action == "NONE" and member.instance_status not in _COMING | {"RUNNING"}:
                status = (member.instance_status or "deleted").lower()
                return f"machine {member.name} {'preempted' if self.options.spot else status}"
        return ""

    def _problem(self, name: str, group: Any, members: Sequence[Any]) -> str:
        """Returns why machines could not be made, if that may change; raises ConfigError if it will not."""
        errors = [*group.status.bulk_instance_operation.last_progress_check.error.errors]
        errors.extend(error for member in members for error in member.last_attempt.errors.errors)
        for error in errors:
            message = f"{error.code}: {' '.join(error.message.split())}"
            found = error_of(f"--create {self.topology} in {self.options.zone}", 0, message)
            is_fatal = "QUOTA" in message.upper() or any(word in error.code for word in _FATAL)
            if is_fatal and isinstance(found, ConfigError):
                raise found
            reason = "no capacity" if isinstance(found, Stockout) else "not made"
            return f"{name}: {reason}: {message}"
        return ""

    def _hosts_of(self, names: Sequence[str]) -> list[Host]:
        """Returns the hosts of groups by slice; () if one is missing."""
        request = dict(self._in_zone)
        if self._machines is not None:
            request["filter"] = f"labels.{RUN_LABEL}={self.labels[RUN_LABEL]}"
        instances = {each.name: each for each in items_of(self._what, self._client(_INSTANCES).list, request)}
        hosts: list[Host] = []
        for number, name in enumerate(names):
            members = sorted(member.instance.rpartition("/")[2] for member in self._members(name))
            found = [instances[member] for member in members if member in instances]
            if len(found) < len(members) or any(each.status != "RUNNING" for each in found):
                return []
            hosts.extend(self._hosts(found, number))
        return hosts

    def _hosts(self, instances: Sequence[Any], number: int) -> list[Host]:
        """Returns the hosts of machines of a slice, once they have our key."""
        hosts: list[Host] = []
        for each in map(self._with_key, instances):
            interface = each.network_interfaces[0]
            external = interface.access_configs[0].nat_i_p if interface.access_configs else ""
            address = {"internal": interface.network_i_p, "external": external}
            hosts.append(self.host(each.name, made=str(each.id), **address, slice=number))
        return hosts

    def _with_key(self, instance: Any) -> Any:
        """Adds our key to a machine that does not have it."""
        what, request = f"add the ssh key to {instance.name}", {**self._in_zone, "instance": instance.name}
        client = self._client(_INSTANCES)

        def items(found: Any) -> dict[str, str]:
            return {item.key: item.value for item in found.metadata.items}

        def write(found: Any, keys: str) -> None:
            changed = [{"key": key, "value": value} for key, value in {**items(found), SSH_KEYS: keys}.items()]
            metadata = compute_module().Metadata(fingerprint=found.metadata.fingerprint, items=changed)
            self._finish(what, change(what, client.set_metadata, {**request, "metadata_resource": metadata}))

        return self.let_in(
            what,
            instance,
            keys=lambda found: items(found).get(SSH_KEYS, ""),
            write=write,
            read=lambda: find(what, client.get, request),
        )

    def _existing(self) -> list[str]:
        """Returns the groups of this name: one, or NAME-0, NAME-1 and so on."""
        if self._group(self.options.name) is not None:
            return [self.options.name]
        names: list[str] = []
        while self._group(name := f"{self.options.name}-{len(names)}") is not None:
            names.append(name)
        return names

    def _machine(self) -> Any:
        return find(self._what, self._client(_INSTANCES).get, {**self._in_zone, "instance": self.options.name})

    def _single(self) -> Any:
        found = self._machine()
        if found is None:
            groups = items_of(self._what, self._client(_GROUPS).list, self._in_zone)
            others = ", ".join(group.name for group in groups) or "no groups"
            raise ConfigError(
                f"--name {self.options.name}: no group or machine of this name in {self.options.zone}, which has:"
                f" {others}; use --create v6e-8 to make one"
            )
        return found

    def _step_existing(self) -> Sequence[Host] | str:
        names = self._existing()
        if names:
            return self._hosts_of(names) or f"machines of {', '.join(names)} do not run yet"
        instance = self._single()
        if instance.status in _COMING:
            return f"{instance.name} is {instance.status.lower()}"
        if instance.status != "RUNNING":
            start = f"gcloud compute instances start {instance.name} --zone {self.options.zone}"
            raise ConfigError(f"--name {instance.name}: the machine is {instance.status}; run `{start}`")
        return self._hosts([instance], 0)


def list_resources(project: str, zone: str = "-") -> list[Resource]:
    """Returns what runs have made in a zone, or in all."""
    groups = _items(_client(_GROUPS), "instance_group_managers", project, zone)
    instances = _items(_client(_INSTANCES), "instances", project, zone, f"labels.{LABEL}=1")
    resources: list[Resource] = []
    for group in groups:
        origin = Origin.parse(group.description)
        if origin is None:
            continue
        mine = [each for each in instances if each.name.startswith(f"{group.base_instance_name}-")]
        mine = [each for each in mine if each.zone.rpartition("/")[2] == group.zone.rpartition("/")[2]]
        running = sum(each.status == "RUNNING" for each in mine)
        starts = {each.name: each.resource_status.upcoming_maintenance.window_start_time for each in mine}
        resources.append(
            Resource(
                kind="managed instance group",
                name=group.name,
                run=origin.run,
                zone=group.zone.rpartition("/")[2],
                state=f"{running} of {group.target_size} RUNNING",
                chips=origin.chips,
                spot=origin.spot,
                created=group.creation_timestamp,
                notice="; ".join(f"{name}: maintenance at {start}" for name, start in starts.items() if start),
            )
        )
    return resources


def _client(kind: str) -> Any:
    return client_of("compute_v1", f"{kind}Client")


def _items(client: Any, name: str, project: str, zone: str, filter: str = "") -> list[Any]:
    what = f"list {name.replace('_', ' ')} of {project}"
    request = {"project": project} | ({"filter": filter} if filter else {})
    if zone != "-":
        return items_of(what, client.list, {**request, "zone": zone})
    return [item for _, scope in items_of(what, client.aggregated_list, request) for item in getattr(scope, name)]

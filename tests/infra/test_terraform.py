"""The Terraform module is read by HashiCorp's parser, and fits the provider's classes, the places and checkov.

Nobody here has an account of Google Cloud, so none of it is made.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxinfra.cli.main import parse_command_line
from jaxinfra.cli.places.arguments import place_options
from jaxinfra.config import load, validate
from jaxinfra.launchers.places.google_errors import PERMISSIONS
from jaxinfra.launchers.places.images import TPU_TYPES, accelerator_type, topology_of
from jaxinfra.launchers.places.sources import source_of
from jaxinfra.run import Run
from tests.infra import provider
from tests.infra.tools import INFRA, ROOT, TOOLS, needs_tools

pytestmark = [needs_tools, pytest.mark.slow(12)]

MODULE = INFRA / "google"
ME = "user:me@example.org"
_PARSE = """
import json, sys, tfparse
print(json.dumps(tfparse.load_from_path(sys.argv[1], stop_on_hcl_error=True, vars_paths=["test.tfvars"])))
"""


class Module:
    """A copy of the module with values of its variables, as HashiCorp's parser evaluates it."""

    def __init__(self, folder: Path, **variables: Any) -> None:
        self.source = "\n".join(path.read_text() for path in sorted(folder.glob("*.tf")))
        self.source = re.sub(r"#.*", "", self.source)
        values = {"project": "my-project", **variables}
        (folder / "test.tfvars").write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        )
        command = [TOOLS / "bin/python", "-c", _PARSE, folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"does not parse: {done.stderr.splitlines()[-1]}"
        self.parsed: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
        self.lines = {path.name: path.read_text().splitlines() for path in folder.glob("*.tf")}

    def get(self, kind: str, name: str) -> dict[str, Any]:
        """Returns the only one of its name."""
        (found,) = (each for each in self.parsed[kind] if self.name(each) in (f"{kind}.{name}", name))
        return found

    def output(self, name: str) -> Any:
        """Returns the value of an output."""
        return self.get("output", name)["value"]

    def name(self, content: Mapping[str, Any]) -> str:
        """Returns where it stands, such as google_tpu_v2_vm.fleet, without the index."""
        return content["__tfmeta"]["path"].partition("[")[0]

    def problems(self) -> list[str]:
        """Returns what Terraform would refuse."""
        found, seen = list[str](), set[str]()
        for kind, blocks in self.parsed.items():
            for content in blocks if kind.startswith("google_") else ():
                meta = content["__tfmeta"]
                text = "\n".join(self.lines[meta["filename"]][meta["line_start"] - 1 : meta["line_end"]])
                chosen = re.search(r"^  provider +=  *(\S+)", text, re.MULTILINE)
                found += provider.problems(chosen[1] if chosen else "google", kind, content)
                seen.add(self.name(content))
        declared = {
            f"{kind}.{name}" for kind, name in re.findall(r'^resource "(\w+)" "(\w+)"', self.source, re.MULTILINE)
        }
        # As Terraform, the parser cannot know how many to make where that is known after others are made.
        found += [f"{name} is made of what is not known before" for name in sorted(declared - seen)]
        variables = {*re.findall(r'^variable "(\w+)"', self.source, re.MULTILINE)}
        local = {name for each in self.parsed["locals"] for name in each}
        for kind, name in {*re.findall(r"\b(var|local)\.(\w+)", self.source)}:
            if name not in {"var": variables, "local": local}[kind]:
                found.append(f"{kind}.{name} is nowhere")
        for kind, name, attribute in {*re.findall(r'\b(google_\w+)\.(\w+)(?:\["\w+"\])?(?:\.(\w+))?', self.source)}:
            of = provider.schema("google", kind)
            if f"{kind}.{name}" not in declared or of is None or (attribute and attribute not in of.attributes):
                found.append(f"{kind}.{name}.{attribute} is nowhere")
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """The module as a user with a fleet has it."""
    folder = tmp_path_factory.mktemp("terraform") / "module"
    shutil.copytree(MODULE, folder)
    return Module(folder, users=[ME], fleet=2, chips="v5e-16")


def test_the_provider_takes_all_of_it(made: Module) -> None:
    assert not made.problems()
    assert len(made.parsed["google_tpu_v2_vm"]) == 2 and len(made.parsed["google_project_iam_member"]) == 3


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("main.tf", "versioning { enabled = true }", "versioning { enable = true }", "versioning has no enable"),
        ("main.tf", "versioning { enabled = true }", "versioning {}", "versioning lacks enabled"),
        ("main.tf", "versioning { enabled = true }", "versioning = { enabled = true }", "versioning is a block"),
        ("main.tf", 'metadata         = { enable-oslogin = "FALSE" }', "metadata {}", "metadata is an argument"),
        ("main.tf", "location  ", "region  ", "google_storage_bucket has no region"),
        ("main.tf", "location  ", "storage_class  ", "google_storage_bucket lacks location"),
        ("main.tf", "google_compute_router_nat", "google_compute_nat", "google has no google_compute_nat"),
        ("main.tf", "  provider         = google-beta\n", "", "google has no google_tpu_v2_vm"),
        ("main.tf", "google_compute_router.hosts.name", "google_compute_router.hosts.title", "title is nowhere"),
        ("main.tf", "google_compute_router.hosts.name", "google_compute_router.host.name", "host.name is nowhere"),
        ("outputs.tf", "var.fleet", "var.size", "var.size is nowhere"),
        (
            "main.tf",
            "for_each = { deletion =",
            "for_each = { (google_service_account.hosts.member) =",
            "not known before",
        ),
        ("main.tf", "versioning {", "versioning { {", "does not parse"),
    ],
)
def test_what_terraform_refuses_is_found(tmp_path: Path, file: str, old: str, new: str, problem: str) -> None:
    shutil.copytree(MODULE, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new))
    try:
        found = Module(tmp_path, users=[ME], fleet=1).problems()
    except AssertionError as error:
        found = [str(error)]
    assert any(problem in each for each in found), found


def test_what_a_user_may_choose_is_checked(tmp_path: Path) -> None:
    shutil.copytree(MODULE, tmp_path, dirs_exist_ok=True)
    values: dict[str, Sequence[Any]] = {
        "chips": ("v5p-32", "v7-8", "v6e", "v6e-0"),
        "zone": ("us-east5-a", "us-east5"),
        "name": ("lm-team", "A B", "short", "a" * 23),
        "keep_days": (90, 6, 91),
        "fleet": (3, -1, 0.5),
    }
    for name, (right, *wrong) in values.items():
        for value in (right, *wrong):
            found = Module(tmp_path, **{name: value}).get("variable", name)["validation"]["condition"]
            assert found is (value == right), (name, value)


def test_hosts_and_users_have_the_rights_of_the_places(made: Module) -> None:
    roles = {each["role_id"]: {*each["permissions"]} for each in made.parsed["google_project_iam_custom_role"]}
    needed = {right for rights in PERMISSIONS.values() for right in rights}
    assert roles["jaxinfra_users"] == {right for right in needed if not right.startswith("iam.")}
    page = (ROOT / "docs/places.md").read_text()
    of_hosts = re.findall(r"roles create jaxinfraHost .*--permissions=(\S+)", page)
    assert roles["jaxinfra_hosts"] == {right for rights in of_hosts for right in rights.split(",")}
    assert {each["role"] for each in made.parsed["google_storage_bucket_iam_binding"]} == {"roles/storage.objectUser"}


def test_the_fleet_is_of_the_table_of_chips(tmp_path: Path, made: Module) -> None:
    shutil.copytree(MODULE, tmp_path, dirs_exist_ok=True)
    for chips in ("v4-16", "v5e-8", "v5p-32", "v6e-16"):
        (machine,) = Module(tmp_path, fleet=1, chips=chips).parsed["google_tpu_v2_vm"]
        assert machine["runtime_version"] == TPU_TYPES[chips.partition("-")[0]].runtime_version
        assert machine["accelerator_type"] == accelerator_type(topology_of(chips))


def test_nothing_is_lost_and_nobody_gets_in(made: Module) -> None:
    bucket = made.get("google_storage_bucket", "runs")
    assert bucket["versioning"]["enabled"] and bucket["public_access_prevention"] == "enforced"
    assert bucket["soft_delete_policy"]["retention_duration_seconds"] == 7 * 86400
    rule = bucket["lifecycle_rule"]
    assert (rule["action"]["type"], rule["condition"]["days_since_noncurrent_time"]) == ("Delete", 7)
    hosts = made.get("google_compute_subnetwork", "hosts")
    doors = {each["source_ranges"][0]: each["allow"] for each in made.parsed["google_compute_firewall"]}
    assert doors.keys() == {"35.235.240.0/20", hosts["ip_cidr_range"]}
    assert (doors["35.235.240.0/20"]["protocol"], doors["35.235.240.0/20"]["ports"]) == ("tcp", ["22"])
    assert not any(each["network_config"]["enable_external_ips"] for each in made.parsed["google_tpu_v2_vm"])


def test_what_is_printed_can_be_typed(tmp_path: Path, made: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines are parsed, fit their place, and ask for what the module has made."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    shutil.copytree(MODULE, tmp_path / "module")
    alone = Module(tmp_path / "module")
    for module, starts in ((made, 2), (alone, 1)):
        prepare, *others = module.output("next").splitlines()
        if module is alone:
            assert f"\n{prepare}\n{others[0]}\n" in (ROOT / "docs/infra.md").read_text()
        assert parse_command_line(shlex.split(prepare)[3:]).command == "data prepare" and len(others) == starts
        for number, line in enumerate(others):
            options = parse_command_line(shlex.split(line)[3:])
            place = place_options(options)
            run = load(ROOT / options.config, options.overrides, root=Run).run
            validate(run)
            bucket = module.get("google_storage_bucket", "runs")["name"]
            assert run.root == f"gs://{bucket}/runs" and place.internal_ips and place.project == "my-project"
            requests = source_of(place, f"{run.root}/{run.name}").requests()
            if module is made:
                machine = module.parsed["google_tpu_v2_vm"][number]
                assert (place.name, place.zone) == (machine["name"], machine["zone"])
                continue
            account, subnetwork = module.get("google_service_account", "hosts"), "us-east5/subnetworks/jaxinfra"
            (body,) = (json.loads(each.body) for each in requests if each.method == "POST")
            assert "spot" in body
            node = body["tpu"]["nodeSpec"][0]["node"]
            assert node["serviceAccount"]["email"].startswith(f"{account['account_id']}@my-project.iam")
            assert node["networkConfig"]["subnetwork"] == f"projects/my-project/regions/{subnetwork}"
            assert not node["networkConfig"].get("enableExternalIps")


def test_ssh_goes_through_the_proxy(tmp_path: Path, made: Module) -> None:
    (tmp_path / "jaxinfra.ssh").write_text(made.output("ssh_config"))
    command = ["ssh", "-F", tmp_path / "jaxinfra.ssh", "-G", "jaxinfra@10.128.0.2"]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    group = made.get("google_iap_tunnel_dest_group", "hosts")
    assert re.search(r"^proxycommand gcloud compute start-iap-tunnel %h %p --listen-on-stdin ", read, re.MULTILINE)
    assert f"--region {group['region']} --network {made.get('google_compute_network', 'hosts')['name']}" in read
    assert f"--dest-group {group['group_name']}" in read


def test_checkov_finds_nothing_without_a_reason() -> None:
    command = [TOOLS / "bin/checkov", "-d", MODULE, "--framework", "terraform", "--skip-download", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = json.loads(done.stdout)["results"]
    assert not [each["check_id"] for each in results["failed_checks"]]
    assert {"CKV_GCP_29", "CKV_GCP_114", "CKV_GCP_2", "CKV2_GCP_32"} <= {
        each["check_id"] for each in results["passed_checks"]
    }
    skipped = {each["check_id"]: each["check_result"]["suppress_comment"] for each in results["skipped_checks"]}
    assert skipped.keys() == {*re.findall(r"checkov:skip=(\w+)", (MODULE / "main.tf").read_text())}
    assert all(len(reason) > 20 for reason in skipped.values())

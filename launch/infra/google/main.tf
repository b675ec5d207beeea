# What runs need in a project of Google Cloud: a bucket, an account for hosts, a private network, and TPU slices.

locals {
  region = replace(var.zone, "/-[a-z]$/", "")
  cidr   = "10.128.0.0/20" # of the hosts
  runtime_versions = { # as in jaxinfra/launchers/places/images.py
    v4 = "tpu-ubuntu2204-base", v5e = "v2-alpha-tpuv5-lite", v5p = "v2-alpha-tpuv5", v6e = "v2-alpha-tpuv6e"
  }
  rights = { # as in jaxinfra/launchers/places/google_errors.py
    "tpu.nodes"                     = "create get list update delete"
    "tpu.operations"                = "get"
    "compute.instanceTemplates"     = "create get useReadOnly delete"
    "compute.resourcePolicies"      = "create get use delete"
    "compute.instanceGroupManagers" = "create get list delete"
    "compute.instances"             = "create get list delete setLabels setMetadata setServiceAccount"
    "compute.disks"                 = "create"
    "compute.subnetworks"           = "use useExternalIp"
    "compute.globalOperations"      = "get"
    "compute.regionOperations"      = "get"
    "compute.zoneOperations"        = "get"
  }
  roles = {
    users = flatten([for what, verbs in local.rights : [for verb in split(" ", verbs) : "${what}.${verb}"]])
    # The first host deletes what a run has made when the run has ended, also if the laptop is gone.
    hosts = ["tpu.nodes.delete", "compute.instanceGroupManagers.delete", "compute.instances.delete"]
  }
}

resource "google_project_service" "apis" {
  for_each           = toset(["tpu", "compute", "iam", "iap"])
  service            = "${each.key}.googleapis.com"
  disable_on_destroy = false
}

resource "google_storage_bucket" "runs" {
  #checkov:skip=CKV_GCP_62:A log of access needs a second bucket; Cloud Audit Logs has changes of this one.
  name                        = "${var.project}-${var.name}"
  location                    = local.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"
  force_destroy               = var.delete_runs
  # No retention_policy, which would refuse what a run does: it overwrites its lease, and the index of its checkpoints.
  versioning { enabled = true }
  soft_delete_policy { retention_duration_seconds = var.keep_days * 86400 }
  lifecycle_rule {
    action { type = "Delete" }
    condition { days_since_noncurrent_time = var.keep_days }
  }
}

resource "google_service_account" "hosts" {
  account_id = "${var.name}-hosts"
  depends_on = [google_project_service.apis]
}

resource "google_storage_bucket_iam_binding" "runs" {
  bucket  = google_storage_bucket.runs.name
  role    = "roles/storage.objectUser"
  members = setunion(var.users, [google_service_account.hosts.member])
}

resource "google_project_iam_custom_role" "ours" {
  for_each    = local.roles
  role_id     = "${replace(var.name, "-", "_")}_${each.key}"
  title       = "jaxinfra: ${each.key}"
  permissions = each.value
  depends_on  = [google_project_service.apis]
}

resource "google_project_iam_member" "hosts" {
  for_each = { deletion = google_project_iam_custom_role.ours["hosts"].name, logs = "roles/logging.logWriter" }
  project  = var.project
  role     = each.value
  member   = google_service_account.hosts.member
}

resource "google_project_iam_member" "users" {
  for_each = var.users
  project  = var.project
  role     = google_project_iam_custom_role.ours["users"].name
  member   = each.key
}

resource "google_service_account_iam_member" "users" {
  for_each           = var.users
  service_account_id = google_service_account.hosts.name
  role               = "roles/iam.serviceAccountUser"
  member             = each.key
}

resource "google_iap_tunnel_dest_group_iam_member" "users" {
  for_each   = var.users
  dest_group = google_iap_tunnel_dest_group.hosts.group_name
  region     = local.region
  role       = "roles/iap.tunnelResourceAccessor"
  member     = each.key
}

resource "google_iap_tunnel_dest_group" "hosts" {
  group_name = var.name
  region     = local.region
  cidrs      = [local.cidr]
  depends_on = [google_project_service.apis]
}

resource "google_compute_network" "hosts" {
  name                    = var.name
  auto_create_subnetworks = false
  mtu                     = 8896 # the largest
  depends_on              = [google_project_service.apis]
}

resource "google_compute_subnetwork" "hosts" {
  #checkov:skip=CKV_GCP_26:A log of flows between hosts that exchange gradients costs more than it tells.
  #checkov:skip=CKV_GCP_76:The network has no IPv6.
  name                     = var.name
  region                   = local.region
  network                  = google_compute_network.hosts.id
  ip_cidr_range            = local.cidr
  private_ip_google_access = true
}

# Hosts have no public addresses: this is their way to packages.
resource "google_compute_router" "hosts" {
  name    = var.name
  region  = local.region
  network = google_compute_network.hosts.id
}

resource "google_compute_router_nat" "hosts" {
  name                               = var.name
  region                             = local.region
  router                             = google_compute_router.hosts.name
  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "ALL_SUBNETWORKS_ALL_IP_RANGES"
}

resource "google_compute_firewall" "ssh" {
  name          = "${var.name}-ssh"
  network       = google_compute_network.hosts.id
  source_ranges = ["35.235.240.0/20"] # of Identity-Aware Proxy
  allow {
    protocol = "tcp"
    ports    = ["22"]
  }
}

resource "google_compute_firewall" "internal" {
  name          = "${var.name}-internal"
  network       = google_compute_network.hosts.id
  source_ranges = [local.cidr]
  allow { protocol = "all" }
}

# Not google_tpu_v2_queued_resource: that of the provider takes neither a service account nor spot.
resource "google_tpu_v2_vm" "fleet" {
  provider         = google-beta
  count            = var.fleet
  name             = "${var.name}-${count.index}"
  zone             = var.zone
  accelerator_type = replace(var.chips, "v5e", "v5litepod")
  runtime_version  = local.runtime_versions[split("-", var.chips)[0]]
  metadata         = { enable-oslogin = "FALSE" }
  network_config {
    subnetwork          = google_compute_subnetwork.hosts.id
    enable_external_ips = false
  }
  service_account {
    email = google_service_account.hosts.email
    scope = ["https://www.googleapis.com/auth/cloud-platform"]
  }
  scheduling_config { spot = var.spot }
  lifecycle { ignore_changes = [metadata] } # a start adds its ssh key
  depends_on = [google_compute_router_nat.hosts, google_compute_firewall.internal, google_compute_firewall.ssh]
}

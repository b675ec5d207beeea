locals {
  root       = "gs://${var.project}-${var.name}"
  store      = "data.store=${local.root}/stores/python-stdlib"
  account    = "${var.name}-hosts@${var.project}.iam.gserviceaccount.com"
  subnetwork = "projects/${var.project}/regions/${local.region}/subnetworks/${var.name}"
  create     = "--create ${var.chips} --service-account ${local.account} --network ${local.subnetwork}"
  names      = [for number in range(var.fleet) : "--name ${var.name}-${number}"]
}

output "ssh_config" {
  description = "For ssh -F: goes to the hosts through Identity-Aware Proxy."
  value = join(" ", [
    "ProxyCommand gcloud compute start-iap-tunnel %h %p --listen-on-stdin --project ${var.project}",
    "--region ${local.region} --network ${var.name} --dest-group ${var.name}",
  ])
}

output "next" {
  description = "Makes data, then starts a run that makes its own slice, or a run on each slice of the fleet."
  value = join("\n", concat(["python -m launch data prepare configs/quickstart.py ${local.store}"], [
    for number, slices in coalescelist(local.names, [var.spot ? "${local.create} --spot" : local.create]) : join(" ", [
      "python -m launch configs/quickstart.py --place tpu-vm ${slices} --internal-ips --max-hours 2",
      "--project ${var.project} --zone ${var.zone} name=first-${number} train.global_batch=16",
      "root=${local.root}/runs ${local.store} train.compile_cache=${local.root}/compiled",
    ])
  ]))
}

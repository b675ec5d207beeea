variable "project" {
  description = "ID of a project of Google Cloud, which exists and has a billing account."
  type        = string
}

variable "zone" {
  description = "Where the machines are; the bucket and the subnet are in its region."
  default     = "us-east5-b"
  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+-[a-z]$", var.zone))
    error_message = "zone: expected a zone, with its letter; use us-east5-b."
  }
}

variable "name" {
  description = "Begins all names, so 6 to 22 of a-z, 0-9 and -; the bucket is PROJECT-NAME."
  default     = "jaxinfra"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,20}[a-z0-9]$", var.name))
    error_message = "name: expected 6 to 22 of a-z, 0-9 and -, with a letter first; use jaxinfra."
  }
}

variable "users" {
  description = "Who may start runs and go to hosts, such as user:me@example.org."
  type        = set(string)
  default     = []
}

variable "keep_days" {
  description = "Days, 7 to 90, for which what was overwritten or deleted is kept, and then can be restored."
  default     = 7
  validation {
    condition     = var.keep_days >= 7 && var.keep_days <= 90 && floor(var.keep_days) == var.keep_days
    error_message = "keep_days: expected 7 to 90, a whole number; use 7."
  }
}

variable "delete_runs" {
  description = "Whether `terraform destroy` deletes the bucket with all runs in it, and not only an empty one."
  default     = false
}

variable "chips" {
  description = "A TPU slice, as `--create` takes it."
  default     = "v6e-16"
  validation {
    condition     = can(regex("^(v4|v5e|v5p|v6e)-[1-9][0-9]*$", var.chips))
    error_message = "chips: expected v4, v5e, v5p or v6e and a size; use v6e-16."
  }
}

variable "spot" {
  description = "Whether slices are spot ones: cheaper, and taken away at any time."
  default     = true
}

variable "fleet" {
  description = "Slices that stand ready, and cost, until destroyed. With 0 each run makes and deletes its own."
  default     = 0
  validation {
    condition     = var.fleet >= 0 && floor(var.fleet) == var.fleet
    error_message = "fleet: expected a number of slices; use 0."
  }
}

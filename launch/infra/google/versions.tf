terraform {
  required_version = ">= 1.5"
  required_providers {
    google      = { source = "hashicorp/google", version = "~> 6.50" }
    google-beta = { source = "hashicorp/google-beta", version = "~> 6.50" } # TPU VMs are only there
  }
}

provider "google" { project = var.project }

provider "google-beta" { project = var.project }

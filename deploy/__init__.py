"""What an operator runs: images, compose files, Kubernetes manifests, dashboards, and the demo's data."""

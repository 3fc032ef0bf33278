"""Kept through 0.3: Serve applications deployed by 0.2 name this module and pickle its classes by reference."""

from workers.serving.ray.applications import Ingress, ModelReplica, ingress_app, model_app

__all__ = ["Ingress", "ModelReplica", "ingress_app", "model_app"]

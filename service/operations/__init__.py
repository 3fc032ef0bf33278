"""Use cases behind the routes of the control plane."""

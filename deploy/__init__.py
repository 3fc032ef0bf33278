"""The demo's data and traffic, study configurations, and the release script."""

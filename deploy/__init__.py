"""The demo's text and traffic, ready-made study configurations, and the script that releases a version."""

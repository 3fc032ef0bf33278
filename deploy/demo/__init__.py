"""What `pathswitch demo` feeds to the service."""

"""The data, traffic and picture of `pathswitch demo`."""

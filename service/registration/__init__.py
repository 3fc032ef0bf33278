"""Registration: records ingested bodies as data versions and slices of their datasets."""

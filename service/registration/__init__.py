"""Registration: writes ingested bodies down as data versions and slices of their datasets."""

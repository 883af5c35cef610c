"""Everything that is only about speed: devices, precisions, fast paths. Nothing else calls private torch functions."""

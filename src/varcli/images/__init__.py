"""Reading images: folders, archives, data sets, masks, tiles, provenance."""

"""Writing images: files, folders, archives and streams."""

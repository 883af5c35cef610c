"""From files to models: the safetensors store, the registry, conversion and download."""

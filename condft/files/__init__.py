"""Files: atomic writing, hashes of tensors, the cache folder, errors of the hub, YAML."""

"""From the weights of a model to a report: walk, look up in the cache, measure, share the work between processes."""

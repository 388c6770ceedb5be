"""From the weights of a model to a report: walk, share between processes, look up in the cache, measure."""

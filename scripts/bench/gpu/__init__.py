"""Everything that only a GPU can show, in under ten minutes on one H100 (`scripts/gpu_check.sh`)."""

"""Documentation that is written from the code: `python -m scripts.docs.reference`."""

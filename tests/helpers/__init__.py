"""Builders and marks that tests share."""

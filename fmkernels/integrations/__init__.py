"""This library under the names of others."""

"""Measures on the user's own machine which provider serves a call fastest, and keeps it for automatic choice."""

"""What mkdocs.yml needs beside the pages: files from outside of docs/, formulas, and docstrings as Markdown."""

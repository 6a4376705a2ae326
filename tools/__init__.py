"""Commands for developers and for bare GPU machines; README.md lists them."""

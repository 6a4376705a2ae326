"""What a user copies: small examples, and training jobs (`train.py`)."""

"""What a user copies: small examples, and two training jobs (`train.py`)."""

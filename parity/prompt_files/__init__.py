"""Many prompts of one file: reading them, generating in batches, and the file of their continuations."""

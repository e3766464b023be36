"""What an evaluation leaves behind, and where it was made."""

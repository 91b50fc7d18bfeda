"""What a param group says: its options, which parameters it takes, and how it is shown."""

"""The format certificate: what a trained model must be given and must answer, and any server held to it."""

"""Sharing a converted network: its repository on the Hugging Face Hub, and the model card in it."""

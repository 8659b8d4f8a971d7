"""What the pages of docs/ are made with: references from the code, the picture of the idea, the check of consoles."""

"""What a network says about images in files: an artifact, or a file that was exported from one."""

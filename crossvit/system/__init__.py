"""What the package needs of the operating system: files, text in any encoding, memory, failures as exit statuses."""

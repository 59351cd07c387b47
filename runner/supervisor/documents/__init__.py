"""What is told of a release in files of its own: card, manifest, pictures. Pure: facts in, bytes out."""

"""What several tests share: small models, images, fixtures of the original."""

"""The models and what they are made of: CrossViT, its fusion schemes, and one-branch vision transformers."""
